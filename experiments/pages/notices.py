"""What a reader must know of a run's router before comparing its figures."""

from __future__ import annotations

from typing import Any

ROUTER_NOTICES = {
    "expert_choice": "Experts choose tokens, so a token's experts depend on the tokens after it: this model sees future tokens. "
    "A causal model's loss is then not comparable with that of other runs.",
    "hash": "No learned router: a fixed table sends each token id to its experts. Router probabilities, entropy and logits say nothing here.",
    "random": "No learned router: experts are drawn at random, as a control. Router probabilities, entropy and logits say nothing here.",
}


def router_notice(spec: dict[str, Any]) -> str:
    """For a stored spec; empty where its router needs none."""
    moe = (spec.get("model") or {}).get("moe") or {}
    return ROUTER_NOTICES.get((moe.get("router") or {}).get("kind", ""), "")
