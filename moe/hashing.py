"""Tables from token ids to experts (Roller 2021, Hash Layers, section 3.1): random, balanced by frequency, clustered by company.

Letters: V vocabulary, E experts, K experts of a token, W width of a token's vector.
"""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

_BLOCK = 4096  # Rows of [V, E] at a time.
_LLOYD_ROUNDS = 50


def random_table(vocab_size: int, n_experts: int, top_k: int, generator: torch.Generator | None = None) -> Tensor:
    """int64[V, K]: for every token K different experts, each set equally likely; from torch's current seed unless a generator is given."""
    blocks = []
    for start in range(0, vocab_size, _BLOCK):
        lot_BE = torch.rand(min(_BLOCK, vocab_size - start), n_experts, generator=generator)
        blocks.append(lot_BE.topk(top_k, dim=-1).indices)
    return torch.cat(blocks)


def balanced_table(frequency_V: Tensor, n_experts: int, top_k: int, seed: int) -> Tensor:
    """int64[V, K]: tokens from the most frequent to the rarest, each to the K experts that have the least text so far.

    `frequency_V` are occurrences, whole or not. Tokens that never occur weigh a little, so that they are spread as well. `seed`
    orders what is equal: tokens of one frequency and the experts at the start.
    """
    vocab_size = len(frequency_V)
    generator = torch.Generator().manual_seed(seed)
    shuffled_V = torch.randperm(vocab_size, generator=generator)
    order_V = shuffled_V[frequency_V[shuffled_V].argsort(descending=True, stable=True)]
    weights = (frequency_V.double() + 1 / (2 * vocab_size))[order_V].tolist()
    least = [(0.0, place, expert) for place, expert in enumerate(torch.randperm(n_experts, generator=generator).tolist())]
    rows = []
    for weight in weights:
        taken = [heapq.heappop(least) for _ in range(top_k)]
        rows.append([expert for _, _, expert in taken])
        for load, place, expert in taken:
            heapq.heappush(least, (load + weight, place, expert))
    return torch.empty(vocab_size, top_k, dtype=torch.int64).index_copy_(0, order_V, torch.tensor(rows))


def clustered_table(vector_VW: Tensor, n_experts: int, top_k: int, seed: int) -> Tensor:
    """int64[V, K]: the K nearest of E centres that k-means finds among the tokens' vectors; similar tokens share experts.

    Tokens without a vector (zero: they do not occur) get random experts.
    """
    generator = torch.Generator().manual_seed(seed)
    table_VK = random_table(len(vector_VW), n_experts, top_k, generator)
    known_V = vector_VW.any(-1)
    if known_V.any():
        vector_NW = vector_VW[known_V].double()
        centre_EW = k_means(vector_NW, n_experts, generator)
        table_VK[known_V] = _distances(vector_NW, centre_EW).topk(top_k, dim=-1, largest=False).indices
    return table_VK


def k_means(vector_NW: Tensor, n_centres: int, generator: torch.Generator) -> Tensor:
    """float[n_centres, W]: Lloyd's centres from a k-means++ start (Arthur 2007); fewer different vectors than centres leave some equal.

    A centre that nobody is nearest to moves to the vector that lies farthest from its own.
    """
    centre_EW = vector_NW[torch.randint(len(vector_NW), (1,), generator=generator)]
    nearest_N = _distances(vector_NW, centre_EW)[:, 0]
    while len(centre_EW) < n_centres:
        chance_N = nearest_N if nearest_N.sum() > 0 else torch.ones_like(nearest_N)
        chosen = int(torch.searchsorted(chance_N.cumsum(0), chance_N.sum() * torch.rand(1, dtype=chance_N.dtype, generator=generator)))
        new_1W = vector_NW[min(chosen, len(vector_NW) - 1)][None]
        centre_EW = torch.cat([centre_EW, new_1W])
        nearest_N = torch.minimum(nearest_N, _distances(vector_NW, new_1W)[:, 0])
    owner_N = torch.full((len(vector_NW),), -1)
    for _ in range(_LLOYD_ROUNDS):
        distance_N, nearest_now_N = _distances(vector_NW, centre_EW).min(-1)
        if torch.equal(owner_N, nearest_now_N):
            break
        owner_N = nearest_now_N
        count_E = torch.bincount(owner_N, minlength=n_centres)
        sum_EW = torch.zeros_like(centre_EW).index_add_(0, owner_N, vector_NW)
        centre_EW = torch.where(count_E[:, None] > 0, sum_EW / count_E.clamp_min(1)[:, None], centre_EW)
        empty = (count_E == 0).nonzero().squeeze(-1)[: len(vector_NW)]
        centre_EW[empty] = vector_NW[distance_N.topk(len(empty)).indices]
    return centre_EW


def _distances(vector_NW: Tensor, centre_EW: Tensor) -> Tensor:
    """Squared distances [N, E]."""
    square_NE = vector_NW.square().sum(-1, keepdim=True) - 2 * vector_NW @ centre_EW.T + centre_EW.square().sum(-1)
    return square_NE.clamp_min(0)
