"""How often each token occurs in the training text, and in whose company: what hash routers build their tables from.

Both are functions of the corpus (and the seed) alone, so every rank and every attempt gets the same.
Letters: V vocabulary, W width of a vector, P pairs of neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.train.batches import domain_weights
from moe.train.corpus import Domain

REACH = 2  # A neighbour is at most this many places away, before or after.
SAMPLE_TOKENS = 4_000_000  # Neighbours are counted over this much text at most: vectors of frequent tokens have settled long before.
_BLOCK = 65_536
_PAIRS = 262_144  # Rows that are projected at a time, so that memory stays at _PAIRS * W floats.


def token_frequency(domains: Sequence[Domain], vocab_size: int) -> NDArray[np.int64]:
    """int64[V]: occurrences of each token in the training streams of `domains`, in the proportions in which weighted domains are read.

    Raises ValueError for tokens beyond `vocab_size`.
    """
    total = sum(len(domain.training) for domain in domains)
    weights = domain_weights(domains)
    frequency_V = np.zeros(vocab_size)
    for index, domain in enumerate(domains):
        count_V = np.zeros(vocab_size, np.int64)
        for start in range(0, len(domain.training), 16 * _BLOCK):
            count_V += _counts(domain.training[start : start + 16 * _BLOCK], vocab_size)
        frequency_V += count_V * (1.0 if weights is None else weights[index] * total / len(domain.training))
    return frequency_V.round().astype(np.int64)


def neighbour_vectors(domains: Sequence[Domain], vocab_size: int, width: int, seed: int) -> NDArray[np.float32]:
    """float32[V, W]: for each token the direction of its neighbours; of length one, or zero for a token that the sample lacks.

    A random projection (signs drawn from `seed`; Achlioptas 2003) of the square roots of how often each other token stands within
    REACH places. Roots, because the plain counts would say of every token that spaces surround it. Raises ValueError for tokens
    beyond `vocab_size`.
    """
    sign_VW = 2.0 * np.random.Generator(np.random.Philox(seed)).integers(0, 2, (vocab_size, width)).astype(np.float32) - 1.0
    vector_VW = np.zeros((vocab_size, width), np.float32)
    key_P, count_P = _pairs(domains, vocab_size)
    token_P, neighbour_P = np.divmod(key_P, vocab_size)
    for start in range(0, len(key_P), _PAIRS):
        part = slice(start, start + _PAIRS)
        row_PW = np.sqrt(count_P[part], dtype=np.float32)[:, None] * sign_VW[neighbour_P[part]]
        tokens, firsts = np.unique(token_P[part], return_index=True)  # the pairs are in the order of their tokens
        vector_VW[tokens] += np.add.reduceat(row_PW, firsts, axis=0)
    length_V = np.linalg.norm(vector_VW, axis=1, keepdims=True)
    vector_VW /= np.where(length_V > 0, length_V, 1)
    return vector_VW


def _pairs(domains: Sequence[Domain], vocab_size: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(token * V + neighbour, occurrences) of every pair in the sample, sorted."""
    keys, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for block in _sample(domains):
        _counts(block, vocab_size)  # says which token does not fit
        tokens = block.astype(np.int64)
        found = [keys]
        weights = [counts]
        for distance in range(1, REACH + 1):
            before, after = tokens[:-distance], tokens[distance:]
            found += [before * vocab_size + after, after * vocab_size + before]
            weights += [np.ones(len(before), np.int64)] * 2
        keys, place = np.unique(np.concatenate(found), return_inverse=True)
        counts = np.bincount(place, np.concatenate(weights)).astype(np.int64)
    return keys, counts


def _sample(domains: Sequence[Domain]) -> Iterator[NDArray[Any]]:
    """Blocks of text spread evenly over the training streams, SAMPLE_TOKENS in all; everything where there is less."""
    total = sum(len(domain.training) for domain in domains)
    for domain in domains:
        stream = domain.training
        starts = np.arange(0, len(stream), _BLOCK)
        if total > SAMPLE_TOKENS:
            keep = max(1, round(len(stream) / total * SAMPLE_TOKENS / _BLOCK))
            starts = starts[np.unique(np.linspace(0, len(starts) - 1, min(keep, len(starts))).round().astype(np.int64))]
        for start in starts:
            yield stream[start : start + _BLOCK]


def _counts(tokens: NDArray[Any], vocab_size: int) -> NDArray[np.int64]:
    count_V = np.bincount(tokens, minlength=vocab_size)
    if len(count_V) > vocab_size:
        raise ValueError(f"model.vocab_size is {vocab_size}, but the text holds token {len(count_V) - 1}")
    return count_V
