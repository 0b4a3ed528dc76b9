"""Where the text of a spec comes from: one Source for each domain, not read yet."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from moe.train import datasets_text, user_text
from moe.train.stop import SpecRefused
from spec.data import Data
from spec.text import storable_text

Documents = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Source:
    """One domain. `where` is the field of the spec that names it, `identity` changes with its contents.

    `documents` reads it as (name, text); `is_python` and `held_out` tell from a name what a document is, and `held_out` is None
    where the domain has no validation part of its own.
    """

    name: str
    where: str
    identity: dict[str, object]
    documents: Callable[[], Documents]
    is_python: Callable[[str], bool]
    held_out: Callable[[str], bool] | None = None


OWN = ("runs", "log", "corpus", "postgres", "valkey", "admin_password", "secret_key", "client.json", "environment.json")


def sources(data: Data, home: Path) -> Iterator[Source]:
    """The domains of `data`, in the spec's order. Raises SpecRefused for what may not or cannot be read: `home`, moelab's own, is not data."""
    if data.source == "stdlib":
        for domain in data.domains:
            identity: dict[str, object] = {"stdlib": domain, "python": sys.version, "prefix": sys.base_prefix}
            yield Source(domain, "data.domains", identity, partial(_stdlib, domain), _all if domain == "code" else _none)
        return
    names: set[str] = set()
    for index, text in enumerate(data.paths):
        where = f"data.paths[{index}]"
        try:
            root = Path(text).expanduser().resolve()
            _allow_data(root, text, where, home)
            name = str(storable_text(root.stem or str(root)))
            while name in names:
                name = f"{name}-{index}"
            names.add(name)
            yield _of_path(root, name, text, where, data.text_field, home)
        except (OSError, RuntimeError) as error:  # no right to look, a name too long, a home that nobody has
            raise SpecRefused(where, f"{text[:200]} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _of_path(root: Path, name: str, text: str, where: str, text_field: str, home: Path) -> Source:
    if datasets_text.is_dataset(root):
        shards = datasets_text.shards(root, where)
        paths = [path for _, path in shards]
        documents: Callable[[], Documents] = partial(datasets_text.documents, shards, text_field, where)
        held_out = datasets_text.held_out(shards)
    else:
        paths = user_text.files(root, where)
        documents, held_out = partial(user_text.documents, paths, root, text_field, where), None
    for path in paths:
        _allow_data(path.resolve(), str(path), where, home)
    stats = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]
    identity: dict[str, object] = {"files": stats, "root": str(root), "text_field": text_field}
    return Source(name, where, identity, documents, _named_python, held_out)


def _allow_data(path: Path, text: str, where: str, home: Path) -> None:
    """`allow`, and not what moelab itself keeps in its `home`: other people's runs and logs, databases, keys."""
    allow(path, text, where)
    home = home.resolve()
    if path == home or any(path.is_relative_to(home / name) for name in OWN):
        raise SpecRefused(where, f"{text[:200]} is moelab's own (MOELAB_HOME), not data")


def allow(path: Path, text: str, where: str) -> None:
    """Raises SpecRefused where the host's owner has named the directories that runs may read (MOELAB_DATA_ROOTS) and `path` lies in none."""
    roots = [Path(part).expanduser().resolve() for part in os.environ.get("MOELAB_DATA_ROOTS", "").split(os.pathsep) if part]
    if roots and not any(path.is_relative_to(allowed) for allowed in roots):
        raise SpecRefused(where, f"{text[:200]} lies outside the directories that this worker may read (MOELAB_DATA_ROOTS)")


def _stdlib(domain: str) -> Documents:
    from moe.train import stdlib_text  # only where a corpus is built: a warm start does not need it

    return stdlib_text.DOMAINS[domain]()


def _all(name: str) -> bool:
    return True


def _none(name: str) -> bool:
    return False


def _named_python(name: str) -> bool:
    return name.rpartition("#")[0].endswith(".py")
