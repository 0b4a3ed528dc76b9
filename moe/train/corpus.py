"""Token files on disk: text in, memory-mapped token streams out, one pair (training, validation) per domain.

    $MOELAB_HOME/corpus/<hash of what went in>/
        training.bin  validation.bin     tokens: uint16, or uint32 where there are more than 65,536
        python.bin                       uint8 for each held-out document: 1 where it is Python source
        index.json                       tokens and bytes of both

A document is its tokens and then the vocabulary's separator. Whether it is held out depends on its name alone. A corpus is
built in a directory of its own and renamed into place, so that any number of processes may ask for the same one at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe.train import bpe
from moe.train.sources import Documents, Source, allow, sources
from moe.train.stop import SpecRefused
from moe.train.vocabulary import BYTES, SEPARATOR, FromFile, TokenizerError, Vocabulary
from spec.data import Data

__all__ = ["SEPARATOR", "Domain", "held_out", "load", "vocabulary_of"]

_FORMAT = 2
_PARTS = ("training", "validation")
_TOGETHER = 64  # Documents that are encoded at a time: the tokenizers library spreads them over its threads.


@dataclass(frozen=True)
class Domain:
    """The token streams of one domain, memory-mapped. `weight` says how often it is read, None for as often as it is large."""

    name: str
    training: NDArray[Any]
    validation: NDArray[Any]
    vocabulary: Vocabulary = BYTES
    weight: float | None = None
    python: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))


def load(data: Data, home: Path) -> list[Domain]:
    """The domains of `data`, built under `home`/corpus where they are not there yet. Raises SpecRefused."""
    found = list(sources(data, home))
    vocabulary = vocabulary_of(data, home, found)
    dtype = np.dtype(np.uint16 if vocabulary.size <= 2**16 else np.uint32)
    domains = []
    for index, source in enumerate(found):
        # What the tokens are does not depend on the weights: a change of mixture builds nothing anew.
        directory = home / "corpus" / _hash({**source.identity, "share": data.validation_share, "tokens": vocabulary.identity, "format": _FORMAT})
        if not _is_whole(directory):
            _build(directory, source, data.validation_share, vocabulary, dtype)
        training, validation = (np.memmap(directory / f"{part}.bin", dtype, "r") for part in _PARTS)
        python = np.fromfile(directory / "python.bin", np.uint8)
        domains.append(Domain(source.name, training, validation, vocabulary, data.weights[index] if data.weights else None, python))
    return domains


def vocabulary_of(data: Data, home: Path, found: list[Source]) -> Vocabulary:
    """The tokenizer of `data`; byte pairs are learnt from the training text of `found` where that has not been done. Raises SpecRefused."""
    if data.tokenizer == "byte":
        return BYTES
    if data.tokenizer == "file":
        return _from_file(data)
    identity = {"sources": [source.identity for source in found], "share": data.validation_share, "size": data.bpe_vocab_size, "format": bpe.FORMAT}
    path = home / "tokenizers" / _hash(identity) / "tokenizer.json"
    if not path.is_file():
        bpe.learn(bpe.sample([_training_text(source, data.validation_share) for source in found]), data.bpe_vocab_size, path)
    return FromFile(path, bpe.END)


def _from_file(data: Data) -> Vocabulary:
    text = data.tokenizer_path or ""
    try:
        path = Path(text).expanduser().resolve()
        allow(path, text, "data.tokenizer_path")
        return FromFile(path, data.separator)
    except TokenizerError as error:
        raise SpecRefused("data.tokenizer_path", str(error)) from error
    except (OSError, RuntimeError) as error:
        raise SpecRefused("data.tokenizer_path", f"{text[:200]} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _training_text(source: Source, share: float) -> Iterator[str]:
    is_held_out = source.held_out or partial(held_out, share=share)
    for name, text in source.documents():
        if not is_held_out(name):
            yield _sound(source, name, text)


def _sound(source: Source, name: str, text: str) -> str:
    """`text`. Raises SpecRefused where it cannot be encoded."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SpecRefused(source.where, f"document {name} holds a lone surrogate at character {error.start}") from error
    return text


def held_out(document: str, share: float) -> bool:
    """Whether a document belongs to the validation part: a function of its name, so that the split survives any change of order."""
    return _place(document) < share


def _place(document: str) -> float:
    """A number in [0, 1) from the document's name."""
    return int.from_bytes(hashlib.blake2b(document.encode(errors="surrogatepass"), digest_size=8).digest()) / 2**64


def _hash(identity: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]


# ----- building


def _is_whole(directory: Path) -> bool:
    try:
        index = json.loads((directory / "index.json").read_text())
        sizes = {part: index[part] * index["token_bytes"] for part in _PARTS} | {"python": index["held_out"]}
        return all((directory / f"{part}.bin").stat().st_size == size for part, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _build(directory: Path, source: Source, share: float, vocabulary: Vocabulary, dtype: np.dtype[Any]) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    _sweep(directory.parent)
    work = Path(tempfile.mkdtemp(prefix=f"tmp-{os.getpid()}-", dir=directory.parent))
    try:
        counts = _write(work, source, source.held_out or partial(held_out, share=share), vocabulary, dtype)
        if source.held_out is None and not (counts["training"] and counts["validation"]):
            counts = _write(work, source, _split_of_few(source.where, source.documents(), share), vocabulary, dtype)
        if empty := [part for part in _PARTS if not counts[part]]:
            raise SpecRefused(source.where, f"the {empty[0]} split holds no text")
        (work / "index.json").write_text(json.dumps({"domain": source.name, "token_bytes": dtype.itemsize, **counts}))
        _publish(work, directory)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _write(work: Path, source: Source, is_held_out: Callable[[str], bool], vocabulary: Vocabulary, dtype: np.dtype[Any]) -> dict[str, int]:
    """Writes both streams; returns their lengths in tokens and in bytes of text, and the number of held-out documents."""
    counts = dict.fromkeys(("training", "validation", "training_bytes", "validation_bytes", "held_out"), 0)
    end = np.array([vocabulary.separator], dtype).tobytes()
    with (
        (work / "training.bin").open("wb") as training,
        (work / "validation.bin").open("wb") as validation,
        (work / "python.bin").open("wb") as python,
    ):
        unread = iter(source.documents())
        while documents := list(islice(unread, _TOGETHER)):
            texts = [_sound(source, name, text) for name, text in documents]
            for (name, text), tokens in zip(documents, vocabulary.encode(texts), strict=True):
                if not len(tokens):  # a tokenizer may leave nothing of white space; separators alone have nothing to predict
                    continue
                out, part = (validation, "validation") if is_held_out(name) else (training, "training")
                out.write(tokens.astype(dtype).tobytes() + end)
                counts[part] += len(tokens) + 1
                counts[f"{part}_bytes"] += len(text.encode())
                if part == "validation":
                    counts["held_out"] += 1
                    python.write(bytes([source.is_python(name)]))
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
