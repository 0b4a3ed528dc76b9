"""Whether weights fit a spec: what the model that they come from and the model that they go to must have in common."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from spec.data import Data
from spec.diff import diff
from spec.experiment import ExperimentSpec
from spec.huggingface.evaluated import evaluated
from spec.model import Model
from spec.problems import Problem, pointer
from spec.start import Upcycle

FREE = ("rope_theta", "rope_scaling", "attention.sliding_window", "attention.full_every", "attention.chunk", "attention.temperature_floor")
FREE_MOE = ("moe.top_k", "moe.capacity", "moe.balance")
"""What fine-tuning may change: how far the model sees, how many experts run, and how they are balanced. All else makes other weights or
another meaning of the same ones."""
_MOST = 8


def problems(spec: ExperimentSpec, source: ExperimentSpec, name: str) -> list[Problem]:
    """Why the weights of `source`, which is called `name`, cannot be the start of `spec`; empty when they can."""
    found = list(_upcycle_problems(spec, source.model, name) if spec.start.kind == "upcycle" else _same(spec.model, source.model, name))
    return (found + list(_tokens(spec.data, source.data, name)))[:_MOST]


def model_problems(spec: ExperimentSpec, source: Model, name: str) -> list[Problem]:
    """The same where only the model of the source is known."""
    found = _upcycle_problems(spec, source, name) if spec.start.kind == "upcycle" else _same(spec.model, source, name)
    return list(found)[:_MOST]


def _same(model: Model, source: Model, name: str) -> Iterator[Problem]:
    yield from _differences(_described(model), _described(source), name, FREE + FREE_MOE)


def _described(model: Model) -> dict[str, Any]:
    """As `evaluated`, with the width inside of a router, which changes what the weights are."""
    plain = evaluated(model)
    if model.moe is not None and model.moe.router.scorer != "linear":
        plain["moe"]["router"]["scorer_dim"] = model.moe.router.scorer_dim
    return plain


def _differences(ours: dict[str, Any], theirs: dict[str, Any], name: str, free: tuple[str, ...]) -> Iterator[Problem]:
    for path, here, there in diff(ours, theirs):
        if not any(path == one or path.startswith(f"{one}.") for one in free):
            key = path.rsplit(".", 1)[-1]
            yield Problem(pointer("model", *path.split(".")), f"{key}: {_shown(here)}, but {name} has model.{path} {_shown(there)}")


def _upcycle_problems(spec: ExperimentSpec, source: Model, name: str) -> Iterator[Problem]:
    start, model = spec.start, spec.model
    moe = model.moe
    if not isinstance(start, Upcycle) or moe is None:
        return
    if source.moe is not None:
        where = next(key for key in ("run", "path", "huggingface") if getattr(start, key) is not None)
        yield Problem(pointer("start", where), f"{where}: {name} has MoE layers (model.moe) already; upcycling begins with a dense model")
        return
    ours, theirs = _described(model), _described(source)
    for key in ("moe", "activation", "d_ff"):
        ours.pop(key, None), theirs.pop(key, None)
    yield from _differences(ours, theirs, name, FREE)
    if model.activation != source.activation:
        yield Problem("/model/activation", f"activation: {model.activation}, but {name} has model.activation {source.activation}")
    if len(model.moe_layers()) < model.n_layers and model.d_ff != source.d_ff:
        yield Problem("/model/d_ff", f"d_ff: {model.d_ff} in the layers that stay dense, but {name} has model.d_ff {source.d_ff}")
    shared = moe.n_shared * moe.shared_width
    if start.granularity * moe.d_expert + shared != source.d_ff:
        sum_ = f"start.granularity {start.granularity} x {moe.d_expert}" + (f" + {shared} of the shared experts" if shared else "")
        yield Problem(
            "/model/moe/d_expert", f"d_expert: {sum_} = {start.granularity * moe.d_expert + shared}, but {name} has model.d_ff {source.d_ff}"
        )


def _tokens(data: Data, source: Data, name: str) -> Iterator[Problem]:
    """The rows of the embedding must stand for the same tokens."""
    if data.tokenizer != source.tokenizer:
        yield Problem("/data/tokenizer", f"tokenizer: {data.tokenizer}, but {name} has data.tokenizer {source.tokenizer}")
        return
    if data.tokenizer != "bpe":
        return
    keys = ("bpe_vocab_size", "source", "domains", "paths", "text_field", "validation_share")  # the byte pairs are learnt from the training text
    for key in keys:
        here, there = getattr(data, key), getattr(source, key)
        if here != there:
            detail = f"{key}: {_shown(here)}, but {name} learnt its byte pairs with data.{key} {_shown(there)}; name its tokenizer.json instead"
            yield Problem(pointer("data", key), f"{detail} (data.tokenizer file)")


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
