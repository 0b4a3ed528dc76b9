"""Fills the tables of hash routers from the training text: balanced loads need frequencies, clusters the tokens' company."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moe.model import Transformer
from moe.train.corpus import Domain
from moe.train.token_statistics import neighbour_vectors, token_frequency

VECTOR_WIDTH = 64  # Distances between tokens keep their order within a few per cent (Johnson-Lindenstrauss).


def fill_tables(model: Transformer, domains: Sequence[Domain], seed: int) -> None:
    """Fill the table of every hash router of `model`; nothing where it has none. The same on every rank and at every start."""
    routers = model.hash_routers()
    if not routers:
        return
    vocab_size = model.spec.vocab_size
    frequency_V = torch.from_numpy(token_frequency(domains, vocab_size))
    clustered = routers[0].spec.hash == "clustered"
    vector_VW = torch.from_numpy(neighbour_vectors(domains, vocab_size, VECTOR_WIDTH, seed)) if clustered else None
    for layer, router in enumerate(routers):
        router.fill(frequency_V, vector_VW, seed * len(routers) + layer)
