"""The user's own text: files and directories of .txt, .md, .py, .jsonl and .parquet, streamed as documents.

Every problem is a SpecRefused that names the field of the spec and what is wrong with it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from moe.train import tables_text
from moe.train.stop import SpecRefused

SUFFIXES = (".txt", ".md", ".py", ".jsonl", ".parquet")
_PIECE_CHARS = 16_384  # A longer text is cut at a line's end into documents of about this size, so that a part can be held out.


def files(path: Path, where: str) -> list[Path]:
    """The readable files of `path`, a file or a directory, in the order of their names. `where` names the field in errors."""
    if not path.exists():
        raise SpecRefused(where, f"{path} does not exist on this machine")
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise SpecRefused(where, f"{path} is a {path.suffix or 'nameless'} file; {', '.join(SUFFIXES)} are read")
        return [path]
    named = (Path(base) / name for base, _, names in os.walk(path) for name in names if Path(name).suffix in SUFFIXES)
    found = [file for file in named if file.is_file()]  # a pipe would be waited for, and a link may lead nowhere
    if not found:
        raise SpecRefused(where, f"{path} holds no {', '.join(SUFFIXES)} file")
    return sorted(found)


def documents(paths: list[Path], root: Path, text_field: str, where: str) -> Iterator[tuple[str, str]]:
    """(name, text) of each document of `paths`. Raises SpecRefused for what cannot be read or decoded."""
    for path in paths:
        name = path.relative_to(root).as_posix() if path != root else path.name
        try:
            if path.suffix == ".jsonl":
                yield from _json_lines(path, name, text_field, where)
            elif path.suffix == ".parquet":
                yield from tables_text.parquet(path, name, text_field, where)
            else:
                yield from _pieces(path, name)
        except UnicodeDecodeError as error:
            raise SpecRefused(where, f"{path} is not UTF-8 text: {error.reason} at byte {error.start} of a block") from error
        except OSError as error:
            raise SpecRefused(where, f"{path} cannot be read: {error.strerror}") from error


def _pieces(path: Path, name: str) -> Iterator[tuple[str, str]]:
    piece: list[str] = []
    size = number = 0
    with path.open(encoding="utf-8-sig", newline="") as lines:
        for line in lines:
            piece.append(line)
            size += len(line)
            if size >= _PIECE_CHARS:
                yield f"{name}#{number}", "".join(piece)
                piece, size, number = [], 0, number + 1
    if size:
        yield f"{name}#{number}", "".join(piece)


def _json_lines(path: Path, name: str, text_field: str, where: str) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise SpecRefused(where, f"line {number} of {path} is not JSON: {error}") from error
            if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
                keys = ", ".join(sorted(record)[:10]) if isinstance(record, dict) else type(record).__name__
                raise SpecRefused("data.text_field", f"line {number} of {path} has no text under {text_field!r}; it has {keys or 'nothing'}")
            text: str = record[text_field]
            if text:
                yield f"{name}#{number}", text
