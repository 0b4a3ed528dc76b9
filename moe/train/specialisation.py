"""Which experts take which kinds of token and which domains: counted over a validation (OLMoE, eq. 7).

N^(k)_{E_i,D} / N_D is the share of the tokens of D, a domain or a class of tokens, that expert i is among the k for; k/E where the
router makes no difference. Letters: L MoE layers, E experts, K chosen per token, C token classes, M domains, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.routing import Choice
from moe.train import token_classes
from moe.train.batches import Batches


@dataclass(frozen=True)
class Specialisation:
    """Tokens of each class and domain that each expert ran on, uint32[L, E, C] and [L, E, M], and how many there were of each."""

    class_tokens: NDArray[np.uint32]
    domain_tokens: NDArray[np.uint32]
    classes: dict[str, int]
    domains: dict[str, int]


class Tally:
    """Counts on one rank; `sums` goes through the reduction over ranks, and `result` reads what comes out of it."""

    def __init__(self, batches: Batches, layers: int, experts: int, sequences: int, device: torch.device) -> None:
        """Over the first `sequences` validation windows of each domain of `batches`."""
        self._batches, self._sequences = batches, sequences
        self._n_classes, self._n_domains = len(token_classes.CLASSES), len(batches.domains)
        self._tokens_LEC = torch.zeros(layers, experts + 1, self._n_classes, dtype=torch.float64, device=device)
        self._tokens_LEM = torch.zeros(layers, experts + 1, self._n_domains, dtype=torch.float64, device=device)
        self._total_C = torch.zeros(self._n_classes, dtype=torch.float64, device=device)
        self._total_M = torch.zeros(self._n_domains, dtype=torch.float64, device=device)

    def add(self, domain: int, rows: slice, choices: tuple[Choice, ...]) -> None:
        """Counts the windows `rows` of `domain`. Layers that choose nothing in evaluation keep their zeros."""
        class_BS = self._batches.validation_classes(domain, self._sequences)[rows]
        class_T = torch.from_numpy(class_BS.astype(np.int64)).flatten().to(self._total_C.device)
        self._total_C += torch.bincount(class_T, minlength=self._n_classes)
        self._total_M[domain] += len(class_T)
        slots = self._tokens_LEC.shape[1]
        for layer, choice in enumerate(choices):
            if len(choice.expert_TK) != len(class_T):
                continue  # the block of an extra prediction, which sees fewer tokens
            both_TK = choice.expert_TK * self._n_classes + class_T[:, None]
            count_EC = torch.bincount(both_TK.flatten(), minlength=slots * self._n_classes).view(slots, self._n_classes)
            self._tokens_LEC[layer] += count_EC
            self._tokens_LEM[layer, :, domain] += count_EC.sum(1)

    def sums(self) -> Tensor:
        """Everything counted, float64, flat."""
        return torch.cat([part.flatten() for part in (self._tokens_LEC, self._tokens_LEM, self._total_C, self._total_M)])

    def result(self, sums: NDArray[np.float64]) -> Specialisation:
        """The counts in `sums`, added up over ranks."""
        parts, start = [], 0
        for like in (self._tokens_LEC, self._tokens_LEM, self._total_C, self._total_M):
            parts.append(sums[start : start + like.numel()].reshape(tuple(like.shape)))
            start += like.numel()
        tokens_LEC, tokens_LEM, total_C, total_M = parts
        return Specialisation(
            tokens_LEC[:, :-1].astype(np.uint32),  # the last row holds what no expert took
            tokens_LEM[:, :-1].astype(np.uint32),
            dict(zip(token_classes.CLASSES, map(int, total_C), strict=True)),
            {domain.name: int(total) for domain, total in zip(self._batches.domains, total_M, strict=True)},
        )
