"""Rotary positions in a config.json, in both spellings: `rope_parameters`, or `rope_theta` and `rope_scaling` before transformers 5."""

from __future__ import annotations

import math
from typing import Any

from spec.attention import Llama3Scaling, LongRopeScaling, YarnScaling
from spec.huggingface.reader import Reader
from spec.model import Model

Plain = dict[str, Any]


def read_rope(config: Reader, theta: float, *, deepseek: bool = False, default: Plain | None = None) -> Plain:
    """`rope_theta` and `rope_scaling` of the spec. `theta` and `default` are what the family means where nothing is said.

    `deepseek` families also scale the attention by mscale_all_dim; in others that field has no such effect.
    """
    top_theta = config.number("rope_theta", theta)
    trained = config.value("original_max_position_embeddings", config.value("max_position_embeddings"))
    scaling = config.part("rope_scaling")
    parameters = config.part("rope_parameters")
    given = parameters if "rope_type" in parameters or "rope_theta" in parameters else scaling
    if default is not None and not any(key in given for key in ("rope_type", "type")):
        given = Reader(default, "rope_parameters")
    if given is not scaling:
        scaling.value("rope_theta")
    found: Plain = {"rope_theta": given.number("rope_theta", top_theta)}
    for holder in (config, given):
        holder.must_be("partial_rotary_factor", 1.0, 1.0, "positions rotate whole heads")
    kind = given.text("rope_type", given.text("type", "default"))
    given.value("type")
    if kind == "linear":
        found["rope_scaling"] = {"kind": "linear", "factor": given.number("factor")}
    elif kind == "llama3":
        found["rope_scaling"] = _llama3(given, trained)
    elif kind == "yarn":
        found["rope_scaling"] = _yarn(given, trained, config, deepseek=deepseek)
    elif kind == "longrope":
        found["rope_scaling"] = _longrope(given, trained, config)
    elif kind != "default":
        given.refuse("rope_type", f"{kind!r} is not among default, linear, llama3, yarn, longrope")
    if kind in ("default", "linear"):
        given.value("original_max_position_embeddings")
        given.value("factor")
    given.unread()
    return found


def _llama3(given: Reader, trained: Any) -> Plain:
    return {
        "kind": "llama3",
        "factor": given.number("factor"),
        "low_freq_factor": given.number("low_freq_factor"),
        "high_freq_factor": given.number("high_freq_factor"),
        "trained_len": given.integer("original_max_position_embeddings", trained),
    }


def _yarn(given: Reader, trained: Any, config: Reader, *, deepseek: bool) -> Plain:
    trained_len = given.integer("original_max_position_embeddings", trained)
    factor = given.number("factor", config.number("max_position_embeddings", trained_len) / max(trained_len, 1))
    mscale, all_dim = given.number("mscale", 0.0), given.number("mscale_all_dim", 0.0)
    if not deepseek and mscale and all_dim:
        given.refuse("mscale", "this family has no attention scale that mscale_all_dim would change")
    # Only where both are given does transformers put their ratio on cosines and sines.
    mscale = mscale if all_dim else 0.0
    _same_factor(given, _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale else _mscale(factor))
    given.value("finetuned")  # whether the weights were trained further: nothing to compute
    return {
        "kind": "yarn",
        "factor": factor,
        "beta_fast": given.number("beta_fast", 32.0),
        "beta_slow": given.number("beta_slow", 1.0),
        "trained_len": trained_len,
        "truncate": given.flag("truncate", True),
        "mscale": mscale,
        "mscale_all_dim": all_dim if deepseek else 0.0,
    }


def _longrope(given: Reader, trained: Any, config: Reader) -> Plain:
    trained_len = given.integer("original_max_position_embeddings", trained)
    factor = given.number("factor", config.number("max_position_embeddings", trained_len) / max(trained_len, 1))
    _same_factor(given, math.sqrt(1 + math.log(factor) / math.log(trained_len)) if factor > 1 and trained_len > 1 else 1.0)
    return {
        "kind": "longrope",
        "short_factor": given.value("short_factor"),
        "long_factor": given.value("long_factor"),
        "short_mscale": given.number("short_mscale", 0.0),
        "long_mscale": given.number("long_mscale", 0.0),
        "trained_len": trained_len,
        "max_len": round(factor * trained_len),
    }


def _mscale(factor: float, weight: float = 1.0) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def _same_factor(given: Reader, formula: float) -> None:
    """Refuses an attention factor of one's own: the spec has the formula's only."""
    stated = given.number("attention_factor", formula)
    if not math.isclose(stated, formula, rel_tol=1e-6):
        given.refuse("attention_factor", f"{stated} is not the {formula:.6g} that follows from the other fields")


def write_rope(model: Model) -> Plain:
    """`rope_parameters` of a config.json."""
    scaling = model.rope_scaling
    found: Plain = {"rope_type": scaling.kind if scaling else "default", "rope_theta": model.rope_theta}
    if scaling is None:
        return found
    if isinstance(scaling, LongRopeScaling):
        found |= {"short_factor": scaling.short_factor, "long_factor": scaling.long_factor, "factor": scaling.max_len / scaling.trained_len}
        found |= {key: value for key in ("short_mscale", "long_mscale") if (value := getattr(scaling, key))}
    else:
        found["factor"] = scaling.factor
    if isinstance(scaling, Llama3Scaling):
        found |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if isinstance(scaling, YarnScaling):
        found |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        found |= {key: value for key in ("mscale", "mscale_all_dim") if (value := getattr(scaling, key))}
    if scaling.kind != "linear":
        found["original_max_position_embeddings"] = scaling.trained_len
    return found
