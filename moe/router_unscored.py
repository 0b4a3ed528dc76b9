"""Routers without scores: hash tables from token to expert, and chance. Gates are 1/k, probabilities uniform, logits 0.

Letters: T tokens, E experts, K chosen per token, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe.hashing import balanced_table, clustered_table, random_table
from moe.router import Router
from moe.routing import Decision
from spec import routing

_MASK = 2**31 - 1


class UnscoredRouter(Router):
    """What hash and random share: everything but the choice."""

    def __init__(self, spec: routing.Router, n_experts: int, top_k: int) -> None:
        super().__init__(spec, n_experts, top_k, biased=False)

    def decide(self, x_TD: Tensor, tokens_T: Tensor | None) -> Decision:
        """Decide. Raises ValueError without token ids."""
        if tokens_T is None:
            raise ValueError(f"a router of kind {self.spec.kind} needs the tokens' ids")
        expert_TK = self.choose(tokens_T)
        zero_TE, even_TE = (
            torch.full((), value, dtype=self.arithmetic(x_TD), device=x_TD.device).expand(len(expert_TK), self.n_experts)
            for value in (0.0, 1 / self.n_experts)
        )
        return Decision(zero_TE, even_TE, expert_TK, self.gates(zero_TE, even_TE, expert_TK))

    def choose(self, tokens_T: Tensor) -> Tensor:
        """int64[T, K], distinct in each row."""
        raise NotImplementedError

    def gates(self, logits_TE: Tensor, score_TE: Tensor, expert_TK: Tensor) -> Tensor:
        """1/k for each, times the scale."""
        return torch.full_like(expert_TK, self.spec.scale / self.top_k, dtype=logits_TE.dtype)


class HashRouter(UnscoredRouter):
    """Hash layers (Roller 2021, section 3.1): `table_VK` says for each token id which experts it takes; saved with the model.

    It starts random; `fill` makes it what the spec's `hash` says, from what the corpus tells of its tokens.
    """

    table_VK: Tensor

    def __init__(self, spec: routing.Router, n_experts: int, top_k: int, vocab_size: int) -> None:
        super().__init__(spec, n_experts, top_k)
        self.register_buffer("table_VK", random_table(vocab_size, n_experts, top_k))

    @torch.no_grad()
    def fill(self, frequency_V: Tensor, vector_VW: Tensor | None, seed: int) -> None:
        """Fill the table from the occurrences [V] of each token and (clustered) float[V, W] vectors of neighbours, both on the CPU."""
        if self.spec.hash == "balanced":
            self.table_VK.copy_(balanced_table(frequency_V, self.n_experts, self.top_k, seed))
        elif self.spec.hash == "clustered":
            if vector_VW is None:
                raise ValueError("hash clustered needs vectors of the tokens' neighbours")
            self.table_VK.copy_(clustered_table(vector_VW, self.n_experts, self.top_k, seed))

    def choose(self, tokens_T: Tensor) -> Tensor:
        """The tokens' rows of the table."""
        return self.table_VK[tokens_T]


class RandomRouter(UnscoredRouter):
    """k experts drawn uniformly for every token. Evaluation draws by a fixed function of place and token id, so that it repeats."""

    salt: Tensor

    def __init__(self, spec: routing.Router, n_experts: int, top_k: int) -> None:
        super().__init__(spec, n_experts, top_k)
        self.register_buffer("salt", torch.randint(_MASK, ()))  # so that layers differ

    def choose(self, tokens_T: Tensor) -> Tensor:
        """Draws by torch's generator in training."""
        shape = (len(tokens_T), self.n_experts)
        lot_TE = torch.rand(shape, device=tokens_T.device) if self.training else self._lots(tokens_T)
        best: Tensor = lot_TE.topk(self.top_k, dim=-1).indices
        return best

    def _lots(self, tokens_T: Tensor) -> Tensor:
        """int64[T, E]: what looks like chance, from place, token, expert and layer."""
        place_T = torch.arange(len(tokens_T), device=tokens_T.device)
        expert_E = torch.arange(self.n_experts, device=tokens_T.device)
        return _mixed(_mixed(_mixed(tokens_T ^ self.salt) ^ place_T)[:, None] ^ expert_E)


def _mixed(x: Tensor) -> Tensor:
    """Scatters integers over 31 bits: two rounds of xor-shift and multiplication by odd numbers, none of which overflows int64."""
    for odd in (0x45D9F3B, 0x119DE1F3):
        x = ((x ^ (x >> 16)) * odd) & _MASK
    return x ^ (x >> 15)
