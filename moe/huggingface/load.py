"""Their weights into our model, tensor by tensor; nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe.huggingface.families import Table, table_of
from moe.huggingface.layout import Option, Row
from moe.huggingface.report import Line, Report
from moe.huggingface.source import Source, WeightsError, read_config
from moe.model import Transformer
from spec.huggingface import family_of, read_model
from spec.huggingface.evaluated import differences
from spec.model import Model

PREFIX = "language_model."
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("chat_template.jinja", "chat_template.json"),
)


def load(directory: Path, model: Transformer) -> Report:
    """Fills `model` with the weights of `directory` (config.json and safetensors), and says where each tensor went.

    Raises ConfigError for a configuration that cannot be carried over, and WeightsError where the model computes something else
    than the configuration says, or where a tensor is missing, left over, of another shape or quantised.
    """
    config = read_config(directory)
    described, notes = read_model(config)
    _check_same(model.spec, described)
    state = model.state_dict()
    report = Report(family_of(config).model_type, notes=notes)
    with torch.no_grad():
        for name, tensor in joined(Source(directory), model.spec, config, {key: value.shape for key, value in state.items()}, report):
            state[name].copy_(tensor)
    return report


def joined(
    source: Source, spec: Model, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], report: Report
) -> Iterator[tuple[str, Tensor]]:
    """Our tensors one after the other, each as soon as it is made; `report` is filled on the way. Raises WeightsError."""
    table = table_of(spec, config, prefix=PREFIX if any(name.startswith(PREFIX) for name in source.names) else "")
    check_covered(table, shapes)
    chosen = [(row, _option(row, source)) for row in table.rows]
    _check_left(table, chosen, source, spec, report)
    for row, option in chosen:
        expected = option.op.split(torch.empty(tuple(shapes[row.ours]) if row.ours else row.shape, device="meta"))
        for name, part in zip(option.theirs, expected, strict=True):
            if source.shape(name) != tuple(part.shape):
                raise WeightsError(f"{name} is {list(source.shape(name))}, but {row.ours} needs {list(part.shape)}")
        theirs = [source.tensor(name, packed=option.op.packed) for name in option.theirs]
        if row.ours is None:
            if any(tensor.any() for tensor in theirs):
                raise WeightsError(f"{option.theirs[0]} is not zero, and the spec has nothing to hold it (balance loss_free_bias)")
        else:
            yield row.ours, option.op.join(theirs)
        note = ("MXFP4, unpacked" if option.op.packed else "") if row.ours else "zero, as the spec has no such tensor"
        report.lines += [Line(name, source.shape(name), source.dtype(name), row.ours or "", note) for name in option.theirs]


def _check_same(ours: Model, theirs: Model) -> None:
    """Weights say nothing about positions, norms and gates: these must be the configuration's."""
    found = differences(ours, theirs)
    if found:
        told = "; ".join(f"model.{path} is {left}, but config.json says {right}" for path, left, right in found)
        raise WeightsError(f"the spec does not compute what the configuration says: {told}")


def check_covered(table: Table, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises WeightsError unless the table names exactly our tensors; those of multi-token prediction have no counterpart."""
    named = {row.ours for row in table.rows if row.ours}
    lacking, unknown = sorted(set(shapes) - named), sorted(named - set(shapes))
    lacking = [name for name in lacking if not name.startswith("mtp.")]  # they keep their initial weights, and do not touch the logits
    if lacking or unknown:
        told = [*(f"{name} has no counterpart" for name in lacking), *(f"{name} is not in this model" for name in unknown)]
        raise WeightsError("the family's table does not fit the model: " + "; ".join(told[:5]))


def _option(row: Row, source: Source) -> Option:
    """The first way of storing the tensor whose parts are all there."""
    for option in row.options:
        if all(name in source for name in option.theirs):
            return option
    nearest = max(row.options, key=lambda option: sum(name in source for name in option.theirs))
    missing = [name for name in nearest.theirs if name not in source]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    raise WeightsError(f"{missing[0]}{more} is missing, of which {row.ours or 'a zero tensor'} is made")


def _check_left(table: Table, chosen: list[tuple[Row, Option]], source: Source, spec: Model, report: Report) -> None:
    """Every tensor that no row has taken is left out for a reason, equal to the embedding it is tied to, or an error."""
    taken = {name for _, option in chosen for name in option.theirs}
    embedding = next(option.theirs[0] for row, option in chosen if row.ours == "embedding.weight")
    unknown = []
    for name in source.names:
        if name in taken:
            continue
        reason = table.reason(name)
        if spec.tie_embeddings and name.endswith("lm_head.weight"):
            if not torch.equal(source.tensor(name), source.tensor(embedding)):
                raise WeightsError(f"{name} is not {embedding}, although config.json ties them (tie_word_embeddings)")
            reason = f"tied to {embedding}, and equal to it"
        if reason is None:
            unknown.append(name)
        else:
            report.lines.append(Line(name, source.shape(name), source.dtype(name), "", reason))
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise WeightsError(f"{unknown[0]}{more} would be dropped: the family {report.family} has no place for it")
