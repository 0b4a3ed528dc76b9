"""What a step says about itself: the routing statistics that the model returned, and the scalars made from them.

A step's figures travel as one int32 vector (floats by their bits): gathered once over the ranks, copied once to the host.
Letters: R ranks, L MoE layers, E experts, N balancing terms that have a loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from moe.routing import RoutingStats
from moe.train.ranks import Ranks
from spec.accounting.limits import MAX_ROUTING_CELLS
from spec.events import PARTS, PASSES
from spec.peak import peak_flop_per_s

Host = Mapping[str, NDArray[Any]]
FIGURE = "router/"  # begins the names of what routers and capacity report of themselves
ROUTER_SCALARS = ("max_vio", "load_cv", "router_entropy", "dead_experts", "dropped_share", "max_logit")
PHASES = ("data", "forward", "backward", "reduce", "optimizer")


def pack(parts: Mapping[str, Tensor]) -> Tensor:
    """int32[n] of all `parts` on their device: integers (below 2^31) by value, floats by the bits of float32."""
    pieces = [part.float().reshape(-1).view(torch.int32) if part.is_floating_point() else part.reshape(-1).to(torch.int32) for part in parts.values()]
    return torch.cat(pieces)


def unpack(rows: NDArray[np.int32], parts: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    """The gathered int32[R, n] as one array [R, *shape] for each of `parts`."""
    arrays: dict[str, NDArray[Any]] = {}
    start = 0
    for name, part in parts.items():
        stop = start + part.numel()
        piece = np.ascontiguousarray(rows[:, start:stop])
        arrays[name] = (piece.view(np.float32) if part.is_floating_point() else piece).reshape(len(rows), *part.shape)
        start = stop
    return arrays


def total(rows: Tensor, parts: Mapping[str, Tensor], name: str) -> Tensor:
    """int64[*shape]: the counts `name` of the gathered int32[R, n], summed over the ranks, on their device."""
    before = list(parts)[: list(parts).index(name)]
    start = sum(parts[other].numel() for other in before)
    return rows[:, start : start + parts[name].numel()].sum(0).view(parts[name].shape)


def step_parts(
    lm_loss: Tensor,
    balance_loss: Tensor,
    grad_norm: Tensor,
    stats: RoutingStats | None,
    bias_LE: Tensor | None,
    flags: Sequence[bool],
    mtp_loss: Tensor | None = None,
) -> dict[str, Tensor]:
    """What a rank contributes to its step's report. `flags`: whether it was asked to stop, and to save. `mtp_loss` is weighted."""
    parts = {"lm_loss": lm_loss, "balance_loss": balance_loss, "grad_norm": grad_norm}
    if mtp_loss is not None:
        parts["mtp_loss"] = mtp_loss
    if any(flags):
        parts["flags"] = torch.tensor(flags, dtype=torch.int32).to(lm_loss.device)
    else:
        parts["flags"] = torch.zeros(len(flags), dtype=torch.int32, device=lm_loss.device)
    if stats is not None:
        parts |= {
            "expert_tokens": stats.expert_tokens_LE,
            "dropped": stats.dropped_LE,
            "router_prob": stats.router_prob_LE,
            "balance": stats.balance_loss_LT,
            "router_entropy": stats.router_entropy_L,
            "max_logit": stats.max_logit,
            **{FIGURE + name: figure for name, figure in sorted(stats.figures.items())},
        }
        if stats.attention_tokens_LE is not None:
            parts["attention_tokens"] = stats.attention_tokens_LE
        if stats.sent_LP is not None:
            parts["sent"] = stats.sent_LP
    if bias_LE is not None:
        parts["expert_bias"] = bias_LE
    return parts


@dataclass(frozen=True)
class Step:
    """A step's figures over all ranks, on the host. Counts are uint32; router arrays are None for a dense model."""

    lm_loss: float
    balance_loss: float
    grad_norm: float
    stop: bool
    save: bool
    tokens_LE: NDArray[np.uint32] | None = None
    dropped_LE: NDArray[np.uint32] | None = None
    prob_LE: NDArray[np.float32] | None = None
    balance_LN: NDArray[np.float32] | None = None
    entropy_L: NDArray[np.float32] | None = None
    bias_LE: NDArray[np.float32] | None = None
    max_logit: float = math.nan
    mtp_loss: float | None = None  # weighted; where the model predicts further ahead
    attention_LE: NDArray[np.uint32] | None = None  # tokens of attention experts
    figures: Mapping[str, float] = field(default_factory=dict)  # by the name of the scalar
    traffic_LRR: NDArray[np.uint32] | None = None  # rows that rank i sent to rank j in each layer, where experts are shared out

    @property
    def loss(self) -> float:
        """What was minimised: cross-entropy, weighted balancing terms and the weighted loss of the extra predictions."""
        return self.lm_loss + self.balance_loss + (self.mtp_loss or 0.0)

    @classmethod
    def over_ranks(cls, host: Host) -> Step:
        """From `unpack`: counts are summed over the ranks, means averaged."""
        flags = host["flags"].sum(axis=0)
        common = cls(
            lm_loss=float(host["lm_loss"].mean(dtype=np.float64)),
            balance_loss=float(host["balance_loss"].mean(dtype=np.float64)),
            grad_norm=float(host["grad_norm"][0]),
            stop=bool(flags[0]),
            save=bool(flags[1]),
            mtp_loss=float(host["mtp_loss"].mean(dtype=np.float64)) if "mtp_loss" in host else None,
        )
        if "expert_tokens" not in host:
            return common
        return replace(
            common,
            tokens_LE=host["expert_tokens"].sum(axis=0, dtype=np.uint32),
            dropped_LE=host["dropped"].sum(axis=0, dtype=np.uint32),
            prob_LE=host["router_prob"].mean(axis=0, dtype=np.float32),
            balance_LN=host["balance"].mean(axis=0, dtype=np.float32),
            entropy_L=host["router_entropy"].mean(axis=0, dtype=np.float32),
            bias_LE=host["expert_bias"][0] if "expert_bias" in host else None,
            max_logit=float(host["max_logit"].max()),
            figures={name: float(array.mean(dtype=np.float64)) for name, array in host.items() if name.startswith(FIGURE)},
            traffic_LRR=_traffic(host["sent"]) if "sent" in host else None,
        ).with_attention(host)

    def with_attention(self, host: Host) -> Step:
        """With the counts of attention experts, where there are any, and what follows from them."""
        if "attention_tokens" not in host:
            return self
        tokens_LE = host["attention_tokens"].sum(axis=0, dtype=np.uint32)
        found = {"moa_max_vio": float(max_vio(tokens_LE).mean()), "moa_dead_experts": float(np.count_nonzero(tokens_LE == 0))}
        return replace(self, attention_LE=tokens_LE, figures={**self.figures, **{FIGURE + name: value for name, value in found.items()}})


@dataclass(frozen=True)
class Sample:
    """Where a sampled step's time went on each rank, float32[R, part, pass] milliseconds, and the bytes of rows it sent to others, float32[R]."""

    part_ms: NDArray[np.float32]
    sent_bytes: NDArray[np.float32] | None

    @classmethod
    def over_ranks(cls, rows: NDArray[np.float32], *, routed: bool) -> Sample:
        """From the gathered rows: the parts, then the bytes, which there are where tokens are `routed` between ranks."""
        return cls(rows[:, :-1].reshape(len(rows), len(PARTS), len(PASSES)), rows[:, -1] if routed else None)

    def tensors(self) -> dict[str, NDArray[Any]]:
        """By their names in spec.events.TENSORS."""
        return {"part_ms": self.part_ms} | ({} if self.sent_bytes is None else {"sent_bytes": self.sent_bytes})


def _traffic(sent_RLP: NDArray[np.int32]) -> NDArray[np.uint32]:
    """[L, R, R] from what each rank sent to the shards of its replica: rank r is shard r % P of replica r // P."""
    ranks, layers, shards = sent_RLP.shape
    traffic_LRR = np.zeros((layers, ranks, ranks), np.uint32)
    for rank, sent_LP in enumerate(sent_RLP):
        first = rank // shards * shards
        traffic_LRR[:, rank, first : first + shards] = sent_LP
    return traffic_LRR


def max_vio(tokens_LE: NDArray[Any]) -> NDArray[np.float64]:
    """float64[L]: (largest - mean) / mean of the experts' token counts (MaxVio, Wang 2024, eq. 4); 0 where nothing was routed."""
    mean_L = tokens_LE.mean(axis=1, dtype=np.float64)
    excess_L: NDArray[np.float64] = tokens_LE.max(axis=1) - mean_L
    return excess_L / np.where(mean_L > 0, mean_L, 1)


def peak(precision: str, ranks: Ranks) -> float | None:
    """FLOP/s of all the run's devices at best; None where it is not known, as of CPUs."""
    if ranks.device.type != "cuda":
        return None
    one = peak_flop_per_s(torch.cuda.get_device_name(ranks.device), precision)
    return None if one is None else one * ranks.size


class Reporter:
    """Turns a Step into the scalars and tensors of a StepDone."""

    def __init__(
        self,
        terms: Sequence[tuple[str, float]],
        *,
        sparse: bool,
        cuda: bool,
        router_prob: bool,
        flops_per_token: int,
        peak_flop_per_s: float | None = None,
        mtp_weight: float | None = None,
    ) -> None:
        """`terms`: name and coefficient of each balancing term that has a loss, in the order of the statistics.

        `flops_per_token`: the accountant's, of training. `peak_flop_per_s`: of all devices together; without it there is no `mfu`.
        `mtp_weight`: what the extra predictions' loss is weighted by, where there are any; the scalar `mtp_loss` is without it.
        """
        self._flops_per_token, self._peak_flop_per_s = flops_per_token, peak_flop_per_s
        self._mtp_weight = mtp_weight
        self._coefficients_N = np.array([coefficient for _, coefficient in terms], np.float64)
        self._router_prob = router_prob
        self._cuda = cuda
        ahead = ["mtp_loss"] if mtp_weight is not None else []
        names = ["loss", "lm_loss", *(f"balance/{name}" for name, _ in terms), *ahead, "grad_norm", "lr", "tokens_per_s", "step_ms", "tflop_per_s"]
        self._names = [*names, *(("mfu",) if peak_flop_per_s else ()), *(ROUTER_SCALARS if sparse else ()), *(("memory_bytes",) if cuda else ())]
        self._figures: list[str] | None = None

    def declare(self, step: Step) -> list[str] | None:
        """The names of all scalars, to be told before the first step's; None afterwards. Which figures routers report, the first step tells."""
        if self._figures is not None:
            return None
        self._figures = sorted(step.figures)
        return self._names + self._figures

    def flop_per_s(self, tokens_per_s: float) -> float:
        """Model FLOPs per second over all devices: what the accountant counts, without recomputation."""
        return self._flops_per_token * tokens_per_s

    def speed(self, tokens_per_s: float) -> str:
        """The speed in words for a terminal."""
        flop_per_s = self.flop_per_s(tokens_per_s)
        share = f" ({flop_per_s / self._peak_flop_per_s:.1%} MFU)" if self._peak_flop_per_s else ""
        return f"{tokens_per_s:,.0f} tokens/s  {flop_per_s / 1e12:.3g} TFLOP/s{share}"

    def scalars(self, step: Step, lr: float, tokens: int, seconds: float) -> NDArray[np.float32]:
        """float32[S], in the order that `declare` told. `tokens` were trained on in `seconds`."""
        values = [step.loss, step.lm_loss]
        if step.balance_LN is not None:
            values += (self._coefficients_N * step.balance_LN.sum(axis=0, dtype=np.float64)).tolist()
        if self._mtp_weight is not None:
            values.append(math.nan if step.mtp_loss is None else step.mtp_loss / self._mtp_weight)
        flop_per_s = self.flop_per_s(tokens / seconds)
        values += [step.grad_norm, lr, tokens / seconds, 1000 * seconds, flop_per_s / 1e12]
        if self._peak_flop_per_s:
            values.append(flop_per_s / self._peak_flop_per_s)
        if step.tokens_LE is not None and step.dropped_LE is not None and step.entropy_L is not None:
            total_LE = step.tokens_LE.astype(np.float64)
            mean_L = total_LE.mean(axis=1)
            values += [
                float(max_vio(step.tokens_LE).mean()),
                float((total_LE.std(axis=1) / np.maximum(mean_L, 1)).mean()),
                float(step.entropy_L.mean(dtype=np.float64)),
                float(np.count_nonzero(step.tokens_LE == 0)),
                float(step.dropped_LE.sum() / max(1.0, total_LE.sum())),
                step.max_logit,
            ]
        if self._cuda:
            values.append(float(torch.cuda.max_memory_allocated()))
        values += [step.figures.get(name, math.nan) for name in self._figures or ()]
        return np.array(values, np.float32)

    def tensors(self, step: Step, phase_ms: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """The StepDone's tensors, by their names in spec.events.TENSORS. `phase_ms` is float32[R, phases]."""
        tensors: dict[str, NDArray[Any] | None] = {"expert_tokens": step.tokens_LE}
        if self._router_prob:
            tensors["router_prob"] = step.prob_LE
        tensors |= {"dropped": step.dropped_LE, "expert_bias": step.bias_LE, "phase_ms": phase_ms}
        if step.traffic_LRR is not None and step.traffic_LRR.size <= MAX_ROUTING_CELLS:
            tensors["rank_traffic"] = step.traffic_LRR
        elif step.traffic_LRR is not None:
            tensors["rank_tokens"] = step.traffic_LRR.sum(axis=0, dtype=np.uint32)
        if len(self._coefficients_N):
            tensors["balance_loss"] = step.balance_LN
        tensors |= {"router_entropy": step.entropy_L, "attention_tokens": step.attention_LE}
        return {name: array for name, array in tensors.items() if array is not None}


def router_at_spike(step: Step, before_L: NDArray[np.float64], moe_layers: Sequence[int]) -> list[dict[str, float]]:
    """Per MoE layer: what the router did at a spike's step, and its mean MaxVio over the steps before, `before_L`."""
    if step.tokens_LE is None or step.entropy_L is None:
        return []
    vio_L = max_vio(step.tokens_LE)
    top_L = step.tokens_LE.argmax(axis=1)
    share_L = step.tokens_LE.max(axis=1) / np.maximum(step.tokens_LE.sum(axis=1, dtype=np.float64), 1)
    dead_L = np.count_nonzero(step.tokens_LE == 0, axis=1)
    return [
        {
            "layer": float(layer),
            "max_vio": float(vio_L[row]),
            "max_vio_before": float(before_L[row]),
            "dead": float(dead_L[row]),
            "top_expert": float(top_L[row]),
            "top_share": float(share_L[row]),
            "entropy": float(step.entropy_L[row]),
        }
        for row, layer in enumerate(moe_layers)
    ]
