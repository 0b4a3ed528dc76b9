"""Frequencies and neighbours of tokens against counting in plain Python."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest

from moe.train import token_statistics
from moe.train.corpus import Domain
from moe.train.token_statistics import neighbour_vectors, token_frequency


def domain(name: str, stream: np.ndarray) -> Domain:
    return Domain(name, stream.astype(np.uint16), stream[:4].astype(np.uint16))


@pytest.fixture
def domains() -> list[Domain]:
    draw = np.random.default_rng(0)
    return [domain("a", draw.integers(0, 20, 700)), domain("b", draw.integers(5, 30, 301))]


def test_frequency_counts_every_training_token(domains: list[Domain]) -> None:
    expected = Counter(token for part in domains for token in part.training.tolist())
    assert token_frequency(domains, 40).tolist() == [expected[token] for token in range(40)]


def test_frequency_follows_the_weights(domains: list[Domain]) -> None:
    weighted = [dataclasses.replace(part, weight=weight) for part, weight in zip(domains, (1.0, 3.0), strict=True)]
    counts = [np.bincount(part.training, minlength=40) / len(part.training) for part in domains]
    np.testing.assert_allclose(token_frequency(weighted, 40), 1001 * (0.25 * counts[0] + 0.75 * counts[1]), atol=0.5)


def test_vectors_are_projected_roots_of_neighbour_counts(domains: list[Domain], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_statistics, "_PAIRS", 7)  # so that a token's pairs fall into several parts
    counts = np.zeros((40, 40))
    for part in domains:
        tokens = part.training.tolist()
        for place, token in enumerate(tokens):
            for other in (place - 2, place - 1, place + 1, place + 2):
                if 0 <= other < len(tokens):
                    counts[token, tokens[other]] += 1
    signs = 2.0 * np.random.Generator(np.random.Philox(9)).integers(0, 2, (40, 16)) - 1.0
    expected = np.sqrt(counts) @ signs
    length = np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(neighbour_vectors(domains, 40, 16, seed=9), expected / np.where(length == 0, 1, length), atol=1e-5)


def test_vectors_of_tokens_with_the_same_company_lie_close() -> None:
    draw = np.random.default_rng(1)
    pieces = [[0, draw.choice([1, 2]), 3] if draw.random() < 0.5 else [4, draw.choice([5, 6]), 7] for _ in range(3000)]
    vectors = neighbour_vectors([domain("a", np.concatenate(pieces))], 8, 64, seed=2)
    assert vectors[1] @ vectors[2] > 0.9
    assert vectors[1] @ vectors[2] > vectors[1] @ vectors[5] + 0.1


def test_a_long_stream_is_sampled_and_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_statistics, "_BLOCK", 100)
    monkeypatch.setattr(token_statistics, "SAMPLE_TOKENS", 1000)
    streams = [domain("a", np.arange(10_000) % 50), domain("b", np.arange(90_000) % 50)]
    blocks = list(token_statistics._sample(streams))
    assert sum(map(len, blocks)) == 1000
    assert np.array_equal(neighbour_vectors(streams, 50, 8, seed=1), neighbour_vectors(streams, 50, 8, seed=1))
    assert not np.array_equal(neighbour_vectors(streams, 50, 8, seed=1), neighbour_vectors(streams, 50, 8, seed=2))


def test_a_token_beyond_the_vocabulary_is_named(domains: list[Domain]) -> None:
    for ask in (lambda: token_frequency(domains, 29), lambda: neighbour_vectors(domains, 29, 4, seed=0)):
        with pytest.raises(ValueError, match=r"model\.vocab_size is 29, but the text holds token 29"):
            ask()
