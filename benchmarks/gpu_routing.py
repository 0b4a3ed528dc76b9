"""What `benchmarks.gpu` checks of the routing: router and sorting, against float64 and torch.

Letters: T tokens, E experts, K experts chosen per token.
"""

# ruff: noqa: N803, N806 - names of tensors carry their shape
from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_layer import MOST, ROUTINGS, SHAPES, Check, Found, choose, error
from kernels import grouped_gemm_triton, router_naive, router_triton, tiles_triton
from kernels.router_naive import Rule

# T, E, K; every one of them compiles some ten kernels
ROUTED = {
    torch.float32: ((1, 4, 1), (257, 64, 8), (129, 160, 6), (65, 256, 8), (31, 1000, 32)),
    torch.bfloat16: ((257, 64, 8),),
}
SORTED = (*(shape[:3] for shape in SHAPES), (32768, 8, 128))  # T, K, E
REPEATED = (8192, 128, 8)  # T, E, K
MOST_ROUTED = {torch.float32: 1e-5, torch.bfloat16: MOST[torch.bfloat16]}


def rules(n_experts: int, top_k: int) -> dict[str, Any]:
    """Every way to score, to choose and to make gates."""
    found = {
        "softmax": Rule(top_k),
        "softmax, renormalised": Rule(top_k, gate="normalised"),
        "softmax of the kept": Rule(top_k, gate="softmax", scale=0.5),
        "sigmoid": Rule(top_k, "sigmoid", "normalised", scale=2.5),
        "sigmoid by logit": Rule(top_k, "sigmoid", by_logit=True),
    }
    if n_experts % 8 == 0 and n_experts > 8:
        found["groups by best"] = Rule(top_k, n_groups=8, top_groups=3, group_score="max")
        found["groups by best two"] = Rule(top_k, "sigmoid", "normalised", n_groups=8, top_groups=4, group_score="top2_sum")
    return found


def router(device: str, dtype: torch.dtype, n_tokens: int, n_experts: int, top_k: int) -> Iterator[Check]:
    """Of every rule, with many equal logits and with a bias too: the order of its own choices, and values and gradients in float64."""
    for name, rule in rules(n_experts, top_k).items():
        for biased, tied in ((False, False), (False, True), *([(True, False)] if rule.score == "sigmoid" else [])):
            logits_TE = torch.randn(n_tokens, n_experts, device=device)
            logits_TE = (logits_TE.round() if tied else logits_TE).to(dtype).requires_grad_()
            bias_E = torch.randn(n_experts, device=device) * 0.3 if biased else None
            got = router_triton.route(logits_TE, bias_E, rule)
            # Within its own choices, so that the rounding of scores decides nothing here.
            best_TK = got.choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
            yield f"route {name} order", float((best_TK != got.expert_TK).sum()), 0.0
            yield f"route {name} counts", float((router_naive.counts(got.expert_TK, n_experts) != got.count_E).sum()), 0.0
            exact_TE = logits_TE.detach().double().requires_grad_()
            twin = router_naive.route(exact_TE, bias_E, rule)
            twin = twin._replace(gate_TK=router_naive.gates(exact_TE, twin.score_TE, got.expert_TK, rule))
            fields = ("prob_TE", "gate_TK", "score_TE", "prob_E")
            for field in fields:
                yield f"route {name} {field}", error(getattr(got, field), getattr(twin, field)), MOST_ROUTED[dtype]
            if rule.limited:
                open_TE, twins_TE = got.choice_TE.isfinite(), twin.choice_TE.isfinite()
                yield f"route {name} open experts", float((open_TE.sum(1) != n_experts // rule.n_groups * rule.top_groups).sum()), 0.0
                if not tied and dtype == torch.float32:  # rounding may decide between two groups of one token in some thousand
                    yield f"route {name} groups", float((open_TE != twins_TE).any(1).sum()) / n_tokens, 0.02
            slopes = [torch.randn_like(getattr(twin, field)) for field in fields]
            mine, wanted = (gradient(part, fields, slopes, x_TE) for part, x_TE in ((got, logits_TE), (twin, exact_TE)))
            yield f"route {name} gradient", error(mine, wanted), MOST_ROUTED[dtype]


def gradient(routed: Any, fields: tuple[str, ...], slopes: list[Tensor], x_TE: Tensor) -> Tensor:
    """Of the logits, for these gradients of these outputs."""
    outputs = [getattr(routed, field) for field in fields]
    return torch.autograd.grad(outputs, x_TE, [slope.to(out.dtype) for slope, out in zip(slopes, outputs, strict=True)])[0]


def sorting(device: str, kind: str, n_tokens: int, top_k: int, n_experts: int) -> Iterator[Check]:
    """The tiles against those of torch's sort; tiles without work may begin anywhere."""
    expert_TK = choose(kind, n_tokens, top_k, n_experts, device)
    got, wanted = (module.make_tiles(expert_TK, n_experts, 128) for module in (tiles_triton, grouped_gemm_triton))
    used_M = wanted.expert_M < n_experts
    unequal = sum(int((getattr(got, name) != value).sum()) for name, value in vars(wanted).items() if name != "start_M")
    yield "tiles", float(unequal + int((got.start_M != wanted.start_M)[used_M].sum())), 0.0


def router_numerics(device: str, dtype: torch.dtype) -> Found:
    """The worst error of everything that the router's kernels give, over ROUTED, and the cases that are beyond what they may be."""
    torch.manual_seed(0)
    name = str(dtype).removeprefix("torch.")
    found = ((shape, check) for shape in ROUTED[dtype] for check in router(device, dtype, *shape))
    return _worst((f"{what} {name}", f"T E K = {shape}", off, most) for shape, (what, off, most) in found)


def sorting_numerics(device: str, routings: Iterable[str] = ROUTINGS, shapes: Iterable[tuple[int, int, int]] = SORTED) -> Found:
    """The same of the sorting."""
    torch.manual_seed(0)
    found = ((f"{kind}, T K E = {shape}", check) for shape, kind in product(shapes, routings) for check in sorting(device, kind, *shape))
    return _worst((what, case, off, most) for case, (what, off, most) in found)


def _worst(checks: Iterable[tuple[str, str, float, float]]) -> Found:
    worst: dict[str, float] = defaultdict(float)
    failures = []
    for key, case, found, most in checks:
        worst[key] = max(worst[key], found)
        if found > most:
            failures.append(f"{key}, {case}: {found:.2e} > {most:.0e}")
    return dict(worst), failures


def repeated(device: str) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """What must give the same bits at every repeat."""
    n_tokens, n_experts, top_k = REPEATED
    logits_TE = torch.randn(n_tokens, n_experts, device=device, requires_grad=True)
    slope_E = torch.randn(n_experts, device=device)
    expert_TK = choose("dropped", n_tokens, top_k, n_experts, device)

    def route(rule: Rule) -> tuple[Tensor, ...]:
        routed = router_triton.route(logits_TE, None, rule)
        loss = (routed.gate_TK * routed.gate_TK).sum() + routed.prob_E @ slope_E
        return *(part.detach() for part in routed), torch.autograd.grad(loss, logits_TE)[0]

    return {
        "router, softmax, forward+backward": lambda: route(Rule(top_k, gate="normalised")),
        "router, sigmoid in groups, forward+backward": lambda: route(
            Rule(top_k, "sigmoid", "normalised", n_groups=8, top_groups=4, group_score="top2_sum")
        ),
        "tiles": lambda: tuple(vars(tiles_triton.make_tiles(expert_TK, n_experts, 128)).values()),
    }
