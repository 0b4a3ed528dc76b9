"""Numbers of parameters: all, those that one token uses, those in matrix products."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Count:
    """Numbers in a part of the model: all of them, those that one token uses, and those of these in matrix products."""

    total: int = 0
    active: int = 0
    matmul: int = 0

    def __add__(self, other: Count) -> Count:
        return Count(self.total + other.total, self.active + other.active, self.matmul + other.matmul)

    def __mul__(self, times: int) -> Count:
        return Count(self.total * times, self.active * times, self.matmul * times)

    def choose(self, k: int, of: int) -> Count:
        """`of` copies, of which a token uses `k`."""
        return Count(self.total * of, self.active * k, self.matmul * k)


def matrix(n: int) -> Count:
    """A matrix of `n` weights that every token is multiplied by."""
    return Count(n, n, n)


def vector(n: int) -> Count:
    """`n` parameters that every token uses without a matrix product: norms, biases."""
    return Count(n, n, 0)
