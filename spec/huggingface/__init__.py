"""Hugging Face's config.json and the spec, both ways. No torch and no transformers: plain data to plain data.

    model_of(config)       the spec's model of a config.json
    experiment_of(config)  an experiment with that model
    config_of(model)       the family that can say what the model computes, and its config.json
    family_of(config)      which family a config.json is

What cannot be carried over is a ConfigError with one problem for each field. The weights are `moe.huggingface`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from spec.experiment import ExperimentSpec
from spec.huggingface.dbrx import DBRX
from spec.huggingface.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from spec.huggingface.evaluated import differences
from spec.huggingface.family import Family
from spec.huggingface.gpt_oss import GPT_OSS
from spec.huggingface.jetmoe import JETMOE
from spec.huggingface.llama import LLAMA, MISTRAL
from spec.huggingface.llama4 import LLAMA4
from spec.huggingface.mixtral import MIXTRAL, PHIMOE
from spec.huggingface.olmoe import OLMOE
from spec.huggingface.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from spec.huggingface.reader import ConfigError, Reader
from spec.model import Model
from spec.problems import Problem, from_validation_error, pointer
from spec.text import storable_text

__all__ = ["FAMILIES", "ConfigError", "Family", "config_of", "experiment_of", "family_of", "model_of", "read_model"]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        *(LLAMA, MISTRAL, QWEN2, QWEN3),
        *(MIXTRAL, OLMOE, QWEN2_MOE, QWEN3_MOE, DEEPSEEK_V2, DEEPSEEK_V3, DBRX, LLAMA4, GPT_OSS, PHIMOE, JETMOE),
    )
}
"""By `model_type`, in the order in which an export tries them."""


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part that describes the language model: Llama 4 keeps it beside a vision tower."""
    inner = config.get("text_config")
    if config.get("model_type") == "llama4" and isinstance(inner, Mapping):
        return {**inner, "model_type": "llama4_text"}
    return config


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that `model_type` names. Raises ConfigError for another, and for quantised weights."""
    name = text_config(config).get("model_type")
    quantised = config.get("quantization_config")
    method = quantised.get("quant_method", "unknown") if isinstance(quantised, Mapping) else quantised
    if quantised and (name, method) != ("gpt_oss", "mxfp4"):  # which its weights can be unpacked from
        detail = f"quantization_config: the weights are quantised ({method}); save them in bfloat16 or float32 first"
        raise ConfigError([Problem("/quantization_config", detail)])
    if not isinstance(name, str) or name not in FAMILIES:
        raise ConfigError([Problem("/model_type", f"model_type: {name!r} is not among {', '.join(FAMILIES)}")])
    return FAMILIES[name]


def model_of(config: Mapping[str, Any]) -> Model:
    """The model that a config.json describes. Raises ConfigError, naming every field that cannot be carried over."""
    return read_model(config)[0]


def read_model(config: Mapping[str, Any]) -> tuple[Model, list[str]]:
    """`model_of`, and what is left behind because it belongs to training alone."""
    family = family_of(config)
    reader = Reader(text_config(config))
    plain = family.read(reader)
    reader.finish()
    try:
        return Model.model_validate(plain), reader.notes
    except ValidationError as error:
        raise ConfigError([Problem("", _told(item)) for item in error.errors(include_url=False)]) from error


def experiment_of(config: Mapping[str, Any], name: str = "", tokenizer: str | None = None) -> ExperimentSpec:
    """An experiment with the model that a config.json describes; the rest has defaults. `tokenizer` is the path of its tokenizer.json.

    Raises ConfigError, also where the vocabulary has no room for byte tokens and there is no tokenizer.
    """
    model = model_of(config)
    plain: dict[str, Any] = {"model": model.model_dump(mode="json"), "name": storable_name(name) or str(config["model_type"])}
    if tokenizer:
        plain["data"] = {"tokenizer": "file", "tokenizer_path": tokenizer}
    try:
        return ExperimentSpec.model_validate(plain)
    except ValidationError as error:
        raise ConfigError([Problem("", str(problem)) for problem in from_validation_error(error)]) from error


def storable_name(name: str) -> str:
    """`name` as a run may be called; empty where nothing of it can be shown."""
    return " ".join(str(storable_text(name)).split())[:200]


def _told(item: Any) -> str:
    return f"model.{'.'.join(str(key) for key in item['loc'])}: {item['msg'].removeprefix('Value error, ')}"


def config_of(model: Model, *, max_len: int = 4096, family: str | None = None) -> dict[str, Any]:
    """A config.json that computes what `model` computes in evaluation; `max_len` is the longest context, in tokens.

    The first family that can say it all is taken, or `family`. Raises ConfigError with the fields that the nearest family lacks.
    """
    if family is not None and family not in FAMILIES:
        raise ConfigError([Problem("", f"family {family!r} is not among {', '.join(FAMILIES)}")])
    tried = [FAMILIES[family]] if family else list(FAMILIES.values())
    lacking = [(lacks(one, model, max_len), one) for one in tried]
    fewest, nearest = min(lacking, key=lambda pair: sum(_weight(problem) for problem in pair[0]))
    if fewest:
        told = [Problem(problem.pointer, f"{problem.detail} ({nearest.model_type}, the nearest family)") for problem in fewest]
        raise ConfigError(told if family is None else fewest)
    return {"architectures": [nearest.architecture], "model_type": nearest.model_type, **nearest.write(model, max_len)}


def lacks(family: Family, model: Model, max_len: int = 4096) -> list[Problem]:
    """What `family` cannot say of `model`, field by field; empty when it can say it all."""
    try:
        back = model_of({"model_type": family.model_type, **family.write(model, max_len)})
    except ConfigError as error:
        return [Problem("", f"{family.model_type} cannot say it: {problem}") for problem in error.problems]
    return [
        Problem(pointer("model", *path.split(".")), f"{path.rsplit('.', 1)[-1]}: {_shown(mine)} cannot be said, only {_shown(other)}")
        for path, mine, other in differences(model, back)
    ]


def _weight(problem: Problem) -> int:
    """How far a family is for this: one without the field at all is farther than one with another value, and one without experts farthest."""
    return {"": 10, "/model/moe": 100}.get(problem.pointer, 1)


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
