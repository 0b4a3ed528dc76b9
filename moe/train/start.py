"""What a run begins with where `spec.start` names weights: they are put into the model before the first step, and the optimiser stays fresh.

Only at a fresh start: a run that goes on has its own checkpoint.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moe.model import Transformer, build_model
from moe.train.origin import Origin, find, readable
from moe.train.ranks import Ranks
from moe.train.stop import SpecRefused
from moe.train.upcycle import upcycle
from spec import start_fits
from spec.experiment import ExperimentSpec
from spec.problems import Problem
from spec.start import FromCheckpoint, FromHuggingFace, Scratch, Upcycle

BIAS = ".router.bias_E"  # what loss-free balancing has learnt: not needed, and not taken where the spec has another way of balancing


def begin(spec: ExperimentSpec, model: Transformer, home: Path, ranks: Ranks) -> str:
    """Fills `model`, and says what with; "" for a start from scratch. `home` is moelab's directory. Raises SpecRefused, naming the fields.

    Every rank calls it.
    """
    start = spec.start
    if isinstance(start, Scratch):
        return ""
    if isinstance(start, FromHuggingFace):
        told = _from_hugging_face(start.path, "start.path", model, home)
    elif isinstance(start, FromCheckpoint):
        told = _from_checkpoint(spec, model, find(start, home, ranks))
    else:
        told = _upcycled(spec, start, model, home, ranks)
    return f"start: {told}; {sum(parameter.numel() for parameter in model.parameters()):,} parameters in all, the optimiser is fresh"


def _from_checkpoint(spec: ExperimentSpec, model: Transformer, origin: Origin) -> str:
    if origin.spec is not None:
        _refuse(start_fits.problems(spec, origin.spec, origin.name))
    taken = copy(model, origin.tensors, origin.name)
    without = sorted({name for name in origin.tensors if name.endswith(BIAS)} - set(taken))
    note = f" ({len(without)} selection biases are left out: the spec has no loss_free_bias)" if without else ""
    return f"the weights of {origin.name}: {len(taken)} tensors{note}"


def _from_hugging_face(text: str, where: str, model: Transformer, home: Path) -> str:
    """Fills `model` from a directory of Hugging Face's. Raises SpecRefused."""
    from moe.huggingface import WeightsError, load
    from spec.huggingface import ConfigError

    directory = readable(text, where, home)
    try:
        report = load(directory, model)
    except (ConfigError, WeightsError) as error:
        raise SpecRefused(where, f"{text[:200]}: {error}") from error
    return f"the weights of {text[:200]}, a {report.family}: {len(report.lines)} tensors"


def _upcycled(spec: ExperimentSpec, start: Upcycle, model: Transformer, home: Path, ranks: Ranks) -> str:
    origin = _dense_of_hugging_face(spec, start.huggingface, home) if start.huggingface is not None else find(start, home, ranks)
    if origin.spec is not None:
        _refuse(start_fits.problems(spec, origin.spec, origin.name))
    dense = {name: tensor for name, tensor in origin.tensors.items() if not name.endswith(BIAS)}
    if any(".ffn.experts." in name for name in dense):
        raise SpecRefused("start", f"{origin.name} has MoE layers already; upcycling begins with a dense model")
    try:
        layers = upcycle(dense, model, start, spec.seed)
    except ValueError as error:
        raise SpecRefused("start", f"{origin.name} does not fit: {error}") from error
    copies = model.spec.moe.n_experts // start.granularity if model.spec.moe else 0
    slices = f", each in {start.granularity} slices" if start.granularity > 1 else ""
    noise = f", noise of {start.noise_std} on {start.noise_share:.0%} of their units" if start.noise_std else ""
    return f"{origin.name} upcycled: {layers} dense layers became MoE layers of {copies} copies{slices}{noise}, with fresh routers"


def _dense_of_hugging_face(spec: ExperimentSpec, text: str, home: Path) -> Origin:
    """The weights of a dense model of Hugging Face's under our names."""
    from moe.huggingface.source import WeightsError, read_config
    from spec.huggingface import ConfigError, model_of

    try:
        source = model_of(read_config(readable(text, "start.huggingface", home)))
    except (ConfigError, WeightsError) as error:
        raise SpecRefused("start.huggingface", f"{text[:200]}: {error}") from error
    _refuse(start_fits.model_problems(spec, source, text[:200]))
    dense = build_model(source)
    _from_hugging_face(text, "start.huggingface", dense, home)
    return Origin(text[:200], dense.state_dict(), None)


@torch.no_grad()
def copy(model: Transformer, tensors: dict[str, Tensor], name: str) -> list[str]:
    """Copies `tensors` into the model's parameters and buffers of the same name, and returns the names. Raises SpecRefused unless they are the same.

    Selection biases may be missing on either side.
    """
    state = model.state_dict()
    lacking = [key for key in state if key not in tensors and not key.endswith(BIAS)]
    left = [key for key in tensors if key not in state and not key.endswith(BIAS)]
    if lacking or left:
        told = f"it has no {lacking[0]}" if lacking else f"model has no place for its {left[0]}"
        raise SpecRefused("start", f"{name} is of another model: {told} ({len(lacking)} tensors lacking, {len(left)} left over)")
    for key in state.keys() & tensors.keys():
        if state[key].shape != tensors[key].shape:
            shapes = f"{key} is {list(tensors[key].shape)}, but model needs {list(state[key].shape)}"
            raise SpecRefused("start", f"{name} is of another model: {shapes}")
        state[key].copy_(tensors[key])
    return sorted(state.keys() & tensors.keys())


def _refuse(problems: list[Problem]) -> None:
    if problems:
        raise SpecRefused("", "; ".join(map(str, problems)))
