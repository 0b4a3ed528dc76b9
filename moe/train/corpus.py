"""Token files on disk: text in, memory-mapped token streams out, one pair (training, validation) per domain.

    $MOELAB_HOME/corpus/<hash of what went in>/   training.bin  validation.bin  index.json      uint16 tokens

A document is its UTF-8 bytes and then SEPARATOR. Whether it is held out depends on its name alone. A corpus is built in
a directory of its own and renamed into place, so that any number of processes may ask for the same one at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moe.train import user_text
from moe.train.stop import SpecRefused
from spec.data import Data

SEPARATOR = 256
_FORMAT = 1
_PARTS = ("training", "validation")
Documents = Iterable[tuple[str, str]]


@dataclass(frozen=True)
class Domain:
    """The token streams of one domain, memory-mapped."""

    name: str
    training: NDArray[np.uint16]
    validation: NDArray[np.uint16]


def load(data: Data, home: Path) -> list[Domain]:
    """The domains of `data`, built under `home`/corpus where they are not there yet. Raises SpecRefused."""
    domains = []
    for name, where, identity, documents in _sources(data):
        directory = home / "corpus" / _hash({**identity, "share": data.validation_share, "format": _FORMAT})
        if not _is_whole(directory):
            _build(directory, name, where, documents, data.validation_share)
        domains.append(Domain(name, *(np.memmap(directory / f"{part}.bin", np.uint16, "r") for part in _PARTS)))
    return domains


def held_out(document: str, share: float) -> bool:
    """Whether a document belongs to the validation part: a function of its name, so that the split survives any change of order."""
    return _place(document) < share


def _place(document: str) -> float:
    """A number in [0, 1) from the document's name."""
    return int.from_bytes(hashlib.blake2b(document.encode(errors="surrogatepass"), digest_size=8).digest()) / 2**64


def _hash(identity: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


# ----- where the text comes from


def _sources(data: Data) -> Iterator[tuple[str, str, dict[str, object], Callable[[], Documents]]]:
    """(domain, field of the spec, what identifies its contents, its documents) of each domain."""
    if data.source == "stdlib":
        for domain in data.domains:
            identity: dict[str, object] = {"stdlib": domain, "python": sys.version, "prefix": sys.base_prefix}
            yield domain, "data.domains", identity, partial(_stdlib, domain)
        return
    names: set[str] = set()
    for index, text in enumerate(data.paths):
        where = f"data.paths[{index}]"
        try:
            root = Path(text).expanduser().resolve()
            _allow(root, text, where)
            paths = user_text.files(root, where)
            stats = [(str(path), (stat := path.stat()).st_size, stat.st_mtime_ns) for path in paths]
        except (OSError, RuntimeError) as error:  # no right to look, a name too long, a home that nobody has
            raise SpecRefused(where, f"{text[:200]} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        name = root.stem or str(root)
        while name in names:
            name = f"{name}-{index}"
        names.add(name)
        identity = {"files": stats, "root": str(root), "text_field": data.text_field}
        yield name, where, identity, partial(user_text.documents, paths, root, data.text_field, where)


def _allow(root: Path, text: str, where: str) -> None:
    """Raises SpecRefused where the host's owner has named the directories that runs may read (MOELAB_DATA_ROOTS) and `root` lies in none."""
    roots = [Path(part).expanduser().resolve() for part in os.environ.get("MOELAB_DATA_ROOTS", "").split(os.pathsep) if part]
    if roots and not any(root.is_relative_to(allowed) for allowed in roots):
        raise SpecRefused(where, f"{text[:200]} lies outside the directories that this worker may read (MOELAB_DATA_ROOTS)")


def _stdlib(domain: str) -> Documents:
    from moe.train import stdlib_text  # only where a corpus is built: a warm start does not need it

    return stdlib_text.DOMAINS[domain]()


# ----- building


def _is_whole(directory: Path) -> bool:
    try:
        index = json.loads((directory / "index.json").read_text())
        return all((directory / f"{part}.bin").stat().st_size == 2 * index[part] for part in _PARTS)
    except (OSError, ValueError, KeyError):
        return False


def _build(directory: Path, name: str, where: str, documents: Callable[[], Documents], share: float) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    _sweep(directory.parent)
    work = Path(tempfile.mkdtemp(prefix=f"tmp-{os.getpid()}-", dir=directory.parent))
    try:
        counts = _write(work, where, documents, lambda document: held_out(document, share))
        if not all(counts.values()):
            counts = _write(work, where, documents, _split_of_few(where, documents(), share))
        (work / "index.json").write_text(json.dumps({"domain": name, **counts}))
        _publish(work, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(work: Path, where: str, documents: Callable[[], Documents], is_held_out: Callable[[str], bool]) -> dict[str, int]:
    """Writes both streams, and returns their lengths in tokens."""
    counts = dict.fromkeys(_PARTS, 0)
    with (work / "training.bin").open("wb") as training, (work / "validation.bin").open("wb") as validation:
        for name, text in documents():
            try:
                data = text.encode()
            except UnicodeEncodeError as error:
                raise SpecRefused(where, f"document {name} holds a lone surrogate at character {error.start}") from error
            tokens = np.empty(len(data) + 1, np.uint16)
            tokens[:-1] = np.frombuffer(data, np.uint8)
            tokens[-1] = SEPARATOR
            out, part = (validation, "validation") if is_held_out(name) else (training, "training")
            out.write(tokens.tobytes())
            counts[part] += len(tokens)
    return counts


def _split_of_few(where: str, documents: Documents, share: float) -> Callable[[str], bool]:
    """The split where hashing put all of a few documents on one side: the share with the lowest hashes, at least one, is held out."""
    names = sorted({name for name, _ in documents}, key=_place)
    if len(names) < 2:
        what = "only one document" if names else "no text"
        raise SpecRefused(where, f"holds {what}; training and validation need one each (longer texts are cut into several)")
    chosen = frozenset(names[: min(len(names) - 1, max(1, round(share * len(names))))])
    return chosen.__contains__


def _publish(work: Path, directory: Path) -> None:
    """Renames the finished directory into place, unless somebody else was faster."""
    for _ in range(2):
        try:
            work.rename(directory)
            return
        except OSError:
            if _is_whole(directory):
                return
            shutil.rmtree(directory, ignore_errors=True)
    raise OSError(f"{directory} cannot be put in place")


def _sweep(parent: Path) -> None:
    """Removes what builders that are dead have left."""
    for path in parent.glob("tmp-*"):
        try:
            os.kill(int(path.name.split("-")[1]), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (ValueError, PermissionError):
            continue
