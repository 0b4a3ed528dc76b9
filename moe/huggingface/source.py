"""A directory of safetensors files, read tensor by tensor: one file, or shards with their index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
READABLE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightsError(ValueError):
    """What of a checkpoint is missing, left over or of another shape; or files that cannot be read."""


class Source:
    """The tensors of a directory, by name. Nothing is read before it is asked for."""

    def __init__(self, directory: Path) -> None:
        """Raises WeightsError where there are no weights, or where the index names what is not there."""
        self.directory = directory
        self._open: dict[Path, Any] = {}
        self._file = {name: file for file in _files(directory) for name in self._names(file)}

    @property
    def names(self) -> list[str]:
        """Every tensor's name, in alphabetical order."""
        return sorted(self._file)

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def shape(self, name: str) -> tuple[int, ...]:
        """Of tensor `name`, without reading it."""
        return tuple(self._opened(self._file[name]).get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """As the file calls it: F32, BF16."""
        return str(self._opened(self._file[name]).get_slice(name).get_dtype())

    def tensor(self, name: str, *, packed: bool = False) -> Tensor:
        """Raises WeightsError for what is not plain floating-point numbers, or bytes where they are asked for with `packed`."""
        kind = self.dtype(name)
        if kind not in (["U8"] if packed else READABLE):
            raise WeightsError(f"{name} is {kind}: quantised weights are not read; save them in bfloat16 or float32 first")
        tensor: Tensor = self._opened(self._file[name]).get_tensor(name)
        return tensor

    def _names(self, file: Path) -> list[str]:
        return list(self._opened(file).keys())

    def _opened(self, file: Path) -> Any:
        if file not in self._open:
            try:
                self._open[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise WeightsError(f"{file} cannot be read: {error}") from error
        return self._open[file]


def _files(directory: Path) -> list[Path]:
    index = directory / INDEX
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise WeightsError(f"{index} is not an index of weights: {error}") from error
        strange = [str(shard) for shard in shards if not isinstance(shard, str) or Path(shard).name != shard]
        if strange:
            raise WeightsError(f"{index} names {strange[0]!r}, which is not a file beside it")
        files = [directory / shard for shard in sorted(shards)]
    else:
        files = [directory / "model.safetensors"] if (directory / "model.safetensors").is_file() else sorted(directory.glob("*.safetensors"))
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        raise WeightsError(f"{missing[0]} is missing, which {INDEX} names")
    if not files:
        pickled = " (pickled weights are not read: save them as safetensors)" if list(directory.glob("*.bin")) else ""
        raise WeightsError(f"{directory} holds no *.safetensors{pickled}")
    return files


def read_config(directory: Path) -> dict[str, Any]:
    """The directory's config.json. Raises WeightsError where there is none."""
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise WeightsError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise WeightsError(f"{path} is not a mapping of fields")
    return config
