"""Fills the tables of hash routers from the training text: balanced loads need frequencies, clusters the tokens' company."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from moe.model import Transformer
from moe.train.batches import Batches
from moe.train.token_statistics import neighbour_vectors, token_frequency

VECTOR_WIDTH = 64  # Distances between tokens keep their order within a few per cent (Johnson-Lindenstrauss).


def fill_tables(model: Transformer, batches: Batches, seed: int) -> None:
    """Fill the table of every hash router of `model`; nothing where it has none. The same on every rank and at every start."""
    routers = model.hash_routers()
    if not routers:
        return
    vocab_size = model.spec.vocab_size
    frequency_V = torch.from_numpy(frequency_as_read(batches, vocab_size))
    clustered = routers[0].spec.hash == "clustered"
    vector_VW = torch.from_numpy(neighbour_vectors(batches.domains, vocab_size, VECTOR_WIDTH, seed)) if clustered else None
    for layer, router in enumerate(routers):
        router.fill(frequency_V, vector_VW, seed * len(routers) + layer)


def frequency_as_read(batches: Batches, vocab_size: int) -> NDArray[np.float64]:
    """float64[V]: how often each token comes in as much text as there is, with each domain's share as the batches take it."""
    if batches.weights is None:
        return token_frequency(batches.domains, vocab_size).astype(np.float64)
    total = sum(len(domain.training) for domain in batches.domains)
    shares = [
        weight * total / len(domain.training) * token_frequency([domain], vocab_size)
        for weight, domain in zip(batches.weights, batches.domains, strict=True)
    ]
    return np.sum(shares, axis=0, dtype=np.float64)
