"""Datasets as Hugging Face's `save_to_disk` leaves them, read without that library.

    dataset        state.json (which lists the .arrow files), dataset_info.json, data-….arrow
    dataset dict   dataset_dict.json {"splits": […]}, and a dataset in the directory of each split

Of a dict, the split `train` is trained on and its validation split (or, without one, its test split) is validated on; of
another dict, and of a single dataset, a share of the documents is held out as it is of files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from moe.train import tables_text
from moe.train.stop import SpecRefused

Shards = list[tuple[str, Path]]
_HELD_OUT = ("validation", "valid", "val", "dev", "eval", "test")


def is_dataset(root: Path) -> bool:
    """Whether `root` is a directory that `save_to_disk` wrote."""
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def shards(root: Path, where: str) -> Shards:
    """(split, file) of each Arrow file that is read, in order. `where` names the field in errors. Raises SpecRefused."""
    if not (root / "dataset_dict.json").is_file():
        return [("", path) for path in _files(root, where)]
    splits = _read(root / "dataset_dict.json", where).get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(split, str) and Path(split).name == split for split in splits):
        raise SpecRefused(where, f"{root / 'dataset_dict.json'} names no splits")
    validation = next((name for name in _HELD_OUT if name in splits), None)
    chosen = ["train", validation] if "train" in splits and validation else splits
    return [(split, path) for split in chosen if split for path in _files(root / split, where)]


def held_out(found: Shards) -> Callable[[str], bool] | None:
    """Which documents of `shards` are of the dataset's own validation split; None where it has none."""
    splits = {split for split, _ in found}
    if "train" not in splits or len(splits) != 2 or not splits & set(_HELD_OUT):
        return None
    return lambda name: not name.startswith("train/")


def documents(found: Shards, text_field: str, where: str) -> Iterator[tuple[str, str]]:
    """(split/file#row, text) of each row. Raises SpecRefused."""
    for split, path in found:
        yield from tables_text.arrow_stream(path, f"{split}/{path.name}" if split else path.name, text_field, where)


def _files(directory: Path, where: str) -> list[Path]:
    listed = _read(directory / "state.json", where).get("_data_files")
    found = [entry.get("filename") for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    names = [name for name in found if isinstance(name, str) and Path(name).name == name]
    if not names or len(names) < len(found):
        raise SpecRefused(where, f"{directory / 'state.json'} lists no data files")
    return [directory / name for name in names]


def _read(path: Path, where: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise SpecRefused(where, f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise SpecRefused(where, f"{path} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}
