"""What of a model's description changes its output in evaluation, in one spelling: what two families must agree on."""

from __future__ import annotations

from typing import Any

from spec.diff import diff
from spec.model import Model
from spec.moe import Moe
from spec.routing import Router

Plain = dict[str, Any]


def evaluated(model: Model) -> Plain:
    """Plain data, equal for two models that compute the same in evaluation from the same weights; keys are the spec's own fields."""
    found = model.model_dump(mode="json", exclude={"dropout", "init_std", "mtp_depth", "mtp_weight", "moe", "attention", "activation", "d_ff"})
    found["attention"] = _attention(model)
    found["final_norm_eps"] = model.final_norm_eps or model.norm_eps
    dense = len(model.moe_layers()) < model.n_layers
    found |= {"activation": model.activation, "d_ff": model.d_ff} if dense else {}
    found["moe"] = None if model.moe is None else _moe(model, model.moe)
    if model.position != "rope":
        del found["rope_theta"], found["rope_scaling"]
    return found


def differences(ours: Model, theirs: Model) -> list[tuple[str, Any, Any]]:
    """(field, value in `ours`, value in `theirs`) of what they compute differently. A selection bias that only `theirs` has can be zero."""
    mine, other = evaluated(ours), evaluated(theirs)
    if mine["moe"] and other["moe"] and not mine["moe"]["balance"]:
        other["moe"]["balance"] = []
    return diff(mine, other)


def _attention(model: Model) -> Plain:
    attention = model.attention
    found: Plain = attention.model_dump(mode="json")
    if attention.kind == "mla":
        found["norm_eps"] = attention.norm_eps or model.norm_eps
    if attention.kind != "gqa":
        return found
    layers = range(1, model.n_layers + 1)
    found["head_dim"] = model.head_dim
    found["full_every"] = [layer for layer in layers if layer % attention.full_every == 0] if attention.sliding_window else []
    bare = [layer for layer in layers if attention.nope_every and layer % attention.nope_every == 0]
    found["nope_every"] = bare
    found["temperature_floor"] = attention.temperature_floor if bare else 0
    if len(bare) == model.n_layers:
        found["chunk"] = None
    return found


def _moe(model: Model, moe: Moe) -> Plain:
    return {
        "n_experts": moe.n_experts,
        "top_k": moe.top_k,
        "d_expert": moe.d_expert,
        "n_shared": min(moe.n_shared, 1),  # several shared experts are one wide one
        "d_shared": moe.n_shared * moe.shared_width,
        "activation": moe.activation or model.activation,
        "bias": moe.bias,
        "combine": moe.combine,
        "every": list(model.moe_layers()),
        "capacity": {"kind": moe.capacity.kind},
        "balance": sorted(term.kind for term in moe.balance if term.kind == "loss_free_bias"),
        "router": _router(moe.router),
    }


def renormalised(router: Router) -> bool:
    """Whether its gates are softmax scores divided by their sum over the k kept. GShard's chance of dropping the second belongs to training."""
    return router.kind in ("topk_softmax", "gshard") or (router.kind == "softmax_topk" and router.renormalise)


def _router(router: Router) -> Plain:
    """Groups that do not limit are none, and a softmax over the k kept is a softmax over all, renormalised."""
    found: Plain = {"kind": router.kind, "renormalise": router.renormalise, "scale": router.scale, "bias": router.bias, "scorer": router.scorer}
    if renormalised(router):
        found |= {"kind": "softmax_topk", "renormalise": True}
    elif router.kind == "switch":
        found |= {"kind": "softmax_topk", "renormalise": False}  # its jitter belongs to training
    elif router.kind == "sparsemixer":
        found["jitter"] = router.jitter
    limited = router.top_groups < router.n_groups
    found |= {key: getattr(router, key) for key in ("n_groups", "top_groups", "group_score")} if limited else {}
    return found
