"""Our weights as a directory that transformers loads: config.json, sharded safetensors with their index, and the tokenizer's files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from moe.huggingface.families import table_of
from moe.huggingface.layout import Row
from moe.huggingface.load import TOKENIZER_FILES, check_covered
from moe.huggingface.report import Line, Report
from moe.huggingface.source import INDEX, WeightsError
from spec.huggingface import config_of
from spec.model import Model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MAX_SHARD_BYTES = 5 * 10**9
_ALWAYS_FLOAT32 = "e_score_correction_bias"  # Steps of 0.001 would be lost in bfloat16.


@dataclass(frozen=True)
class _Piece:
    """One tensor of theirs: part `index` of what `row` is split into."""

    name: str
    row: Row
    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def export(
    tensors: Mapping[str, Tensor],
    model: Model,
    out: Path,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    max_len: int = 4096,
    family: str | None = None,
    tokenizer: Path | None = None,
) -> Report:
    """Writes `tensors`, a state_dict of `model`'s (read one at a time), into the new or empty directory `out`.

    `max_len` is the longest context, in tokens; `tokenizer` a directory whose tokenizer files come along. Raises ConfigError with the
    fields that no family can say, WeightsError where `out` is not empty or the tensors are not the model's.
    """
    if dtype not in DTYPES:
        raise WeightsError(f"dtype {dtype!r} is not among {', '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise WeightsError(f"max_shard_bytes {max_shard_bytes} is not at least 1")
    config = config_of(model, max_len=max_len, family=family)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise WeightsError(f"{out} is not a new or empty directory")
    report = Report(str(config["model_type"]))
    pieces = _pieces(tensors, model, config, DTYPES[dtype], report)
    out.mkdir(parents=True, exist_ok=True)
    _write(tensors, _shards(pieces, max_shard_bytes), out)
    report.lines += [Line(p.name, p.shape, str(p.dtype).removeprefix("torch."), p.row.ours or "", "" if p.row.ours else "zero") for p in pieces]
    (out / "config.json").write_text(json.dumps({**config, "dtype": dtype, "torch_dtype": dtype}, indent=2) + "\n", encoding="utf-8")
    report.notes.append(copy_tokenizer(tokenizer, out))
    return report


def copy_tokenizer(source: Path | None, out: Path) -> str:
    """Takes the tokenizer's files along, and says what came."""
    found = [name for name in TOKENIZER_FILES if source is not None and (source / name).is_file()]
    for name in found:
        assert source is not None
        shutil.copyfile(source / name, out / name)
    if found:
        return f"tokenizer: {', '.join(found)}"
    return "tokenizer: none came along; a model of byte tokens takes UTF-8 bytes as ids 0 to 255"


def _pieces(tensors: Mapping[str, Tensor], model: Model, config: Mapping[str, Any], dtype: torch.dtype, report: Report) -> list[_Piece]:
    shapes = {name: tuple(tensors[name].shape) for name in tensors}
    table = table_of(model, config)
    check_covered(table, shapes)
    pieces = []
    for row in table.rows:
        option = row.options[0]
        parts = option.op.split(torch.empty(shapes[row.ours] if row.ours else row.shape, device="meta"))
        for index, (name, part) in enumerate(zip(option.theirs, parts, strict=True)):
            pieces.append(_Piece(name, row, index, tuple(part.shape), torch.float32 if name.endswith(_ALWAYS_FLOAT32) else dtype))
    for name in tensors:
        if name.startswith("mtp."):
            report.notes.append(f"left out: {name} (transformers has no multi-token prediction of this form)")
    return pieces


def _shards(pieces: list[_Piece], max_bytes: int) -> list[list[_Piece]]:
    """In order, each of `max_bytes` at most, or of one larger tensor."""
    shards: list[list[_Piece]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.size_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.size_bytes
    return shards


def _write(tensors: Mapping[str, Tensor], shards: list[list[_Piece]], out: Path) -> None:
    weight_map: dict[str, str] = {}
    row, parts = None, []
    for number, shard in enumerate(shards, 1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        held = {}
        for piece in shard:
            if piece.row is not row:
                row = piece.row
                whole = torch.zeros(row.shape) if row.ours is None else tensors[row.ours].detach().cpu()
                parts = list(row.options[0].op.split(whole))
            held[piece.name] = parts[piece.index].to(piece.dtype).contiguous().clone()
            weight_map[piece.name] = file
        save_file(held, out / file, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(piece.size_bytes for shard in shards for piece in shard)
        (out / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n", encoding="utf-8")
