"""The storage that hosts share for checkpoints, MOELAB_CHECKPOINTS: a checkpoint goes in whole, its manifest last, and comes out verified.

What opens it is fsspec, which finds its credentials itself: in the environment, or in files of the storage's own library.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from spec.storage import PLACE, normalised
from workers.disk import half_fetched, sync_directory, write
from workers.manifest import MANIFEST, Item, NotWhole, listed

VARIABLE = "MOELAB_CHECKPOINTS"
TOKENIZER = "tokenizer.json"
MAX_JSON_BYTES = 64 * 1024 * 1024
"""More than any manifest or tokenizer has."""
_CHUNK_BYTES = 4 * 1024 * 1024
_WITHOUT_DIRECTORIES = frozenset({"s3", "gs", "az", "abfs", "abfss", "oss", "oci", "cos"})


class Away(Exception):  # noqa: N818
    """The storage does not answer, does not let us, or is full: another try may find it otherwise."""


class Interrupted(Exception):  # noqa: N818
    """Nobody wants it any more."""


def storage_url() -> str:
    """MOELAB_CHECKPOINTS, normalised; "" where it is not set. Raises ValueError, whose text names the variable and not its value."""
    url = os.environ.get(VARIABLE, "")
    try:
        return normalised(url) if url else ""
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from None


def check_storage() -> str:
    """`storage_url`, once its library is there as well; the storage itself may be away. Raises ValueError."""
    url = storage_url()
    if url:
        with contextlib.suppress(Away):
            _opened(url)
    return url


class Storage:
    """Checkpoints under a URL, by their places (spec.storage). Everything raises Away where the storage does not do as it is told."""

    def __init__(self, url: str) -> None:
        """Raises ValueError where no library here opens such a URL; Away too, as some of them connect at once."""
        self.url = url
        self._files, self._root = _opened(url)
        self._on_disk = url.startswith("file://")
        self._has_directories = url.partition("://")[0] not in _WITHOUT_DIRECTORIES

    # ----- in

    def put(self, source: Path, place: str, go_on: Callable[[], bool]) -> str:
        """Copies the checkpoint in the directory `source`, and returns the SHA-256 of its manifest.

        Raises NotWhole where `source` is damaged, Interrupted once `go_on` says no.
        """
        self._look_for_root()
        self._make_directory(place)
        try:
            manifest = (source / MANIFEST).read_bytes()
            for name, item in listed(manifest, _step_of(place)).items():
                with (source / name).open("rb") as file:
                    self._write(f"{place}/{name}", _checked(file, item, name, go_on))
        except OSError as error:
            raise NotWhole(f"it cannot be read here: {told(error)}") from error
        self._write(f"{place}/{MANIFEST}", iter([manifest]))
        return hashlib.sha256(manifest).hexdigest()

    def put_tokenizer(self, data: bytes, place: str) -> None:
        """Puts a tokenizer.json beside the attempt's checkpoints, if it is not there."""
        name = f"{place.rpartition('/')[0]}/tokenizer-{hashlib.sha256(data).hexdigest()}.json"
        self._look_for_root()
        self._make_directory(name.rpartition("/")[0])
        with _answering():
            there = self._files.exists(self._at(name))
        if not there:
            self._write(name, iter([data]))

    def _write(self, name: str, chunks: Iterator[bytes]) -> None:
        with _answering(), self._files.open(self._at(name), "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            if self._on_disk:
                file.flush()
                os.fsync(file.fileno())

    # ----- out

    def get(self, place: str, sha256: str, into: Path, go_on: Callable[[], bool] = lambda: True) -> None:
        """Fetches the checkpoint whose manifest has that SHA-256, verified byte by byte, and publishes it in the directory `into`.

        Raises NotWhole, Interrupted, or OSError where this host's disk does not take it.
        """
        step = _step_of(place)
        final = into / place.rpartition("/")[2]
        work = half_fetched(into, place, os.getpid())
        manifest = self._read(f"{place}/{MANIFEST}")
        if hashlib.sha256(manifest).hexdigest() != sha256:
            raise NotWhole("its manifest is another one than was stored")
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir(parents=True)
            for name, item in listed(manifest, step).items():
                with self._reading(f"{place}/{name}") as source:
                    write(work / name, _checked(source, item, name, go_on))
            write(work / MANIFEST, iter([manifest]))
            sync_directory(work)
            work.rename(final)
            sync_directory(into)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise

    def get_tokenizer(self, place: str) -> bytes | None:
        """The tokenizer.json of the attempt that saved the checkpoint; None if it had none. Raises NotWhole."""
        for name in self._names(place.rpartition("/")[0]):
            if match := re.fullmatch(r"tokenizer-([0-9a-f]{64})\.json", name):
                data = self._read(f"{place.rpartition('/')[0]}/{name}")
                if hashlib.sha256(data).hexdigest() != match[1]:
                    raise NotWhole("its tokenizer.json is another one than was stored")
                return data
        return None

    def _read(self, name: str) -> bytes:
        with self._reading(name) as file:
            data = b"".join(_chunks(file, MAX_JSON_BYTES + 1))
        if len(data) > MAX_JSON_BYTES:
            raise NotWhole(f"{name.rpartition('/')[2]} is too long to be one")
        return data

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[IO[bytes]]:
        """A file of the storage. Raises NotWhole where it is not there although the run's folder is: what is not mounted has nothing."""
        try:
            with _answering():
                self._files.invalidate_cache()
                file = self._files.open(self._at(name), "rb")
        except Away as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            self._look_for_root()
            run = name.partition("/")[0]
            with _answering():
                any_of_run = self._files.exists(self._at(run))
            if not any_of_run:
                raise Away(f"{run} is not there at all: is the storage mounted?") from None
            raise NotWhole(f"{name.rpartition('/')[2]} is not there") from None
        with file:
            yield file

    # ----- away

    def set_aside(self, place: str) -> None:
        """A checkpoint that is damaged no longer looks whole."""
        with contextlib.suppress(Away), _answering():
            self._files.mv(self._at(f"{place}/{MANIFEST}"), self._at(f"{place}/damaged-{MANIFEST}"))

    def remove(self, place: str) -> None:
        """Removes a checkpoint, the manifest first: what a kill leaves of it does not look whole."""
        _step_of(place)
        with _answering():
            self._files.invalidate_cache()
            for path, recursive in ((f"{place}/{MANIFEST}", False), (place, True)):
                with contextlib.suppress(FileNotFoundError):
                    self._files.rm(self._at(path), recursive=recursive)

    def places(self, folder: str, before_attempt: int) -> list[str]:
        """What earlier attempts than that have left in a run's folder, whole or not."""
        found = []
        for attempt in self._names(folder):
            number = attempt.removeprefix("attempt-")
            if attempt != number and number.isdigit() and int(number) < before_attempt:
                names = (f"{folder}/{attempt}/{name}" for name in self._names(f"{folder}/{attempt}"))
                found += [name for name in names if PLACE.fullmatch(name)]
        return found

    # ----- the library

    def _names(self, directory: str) -> list[str]:
        with _answering():
            self._files.invalidate_cache()
            try:
                return sorted(path.rstrip("/").rpartition("/")[2] for path in self._files.ls(self._at(directory), detail=False))
            except FileNotFoundError:
                return []

    def _at(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _is_directory(self, path: str) -> bool:
        with _answering():
            return bool(self._files.isdir(path))

    def _look_for_root(self) -> None:
        """A directory that is not there is not made: it may be where a disk was to be mounted."""
        if self._has_directories and not self._is_directory(self._root):
            raise Away(f"{self.url} is not there: it must be made, or is not mounted")

    def _make_directory(self, name: str) -> None:
        if self._has_directories:  # in a store of objects it would make a bucket
            with _answering():
                self._files.makedirs(self._at(name), exist_ok=True)


def told(error: BaseException) -> str:
    """What is wrong, in one line: without the queries of URLs, which may be signed."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "it is full"
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return re.sub(r"\?[^\s'\"]*", "?…", " ".join(str(text).split()))[:300]


@contextlib.contextmanager
def _answering() -> Iterator[None]:
    """Whatever a storage's library raises is Away; what we raise ourselves stays."""
    try:
        yield
    except (Away, NotWhole, Interrupted):
        raise
    except Exception as error:  # each library has its own
        raise Away(told(error)) from error


def _opened(url: str) -> tuple[Any, str]:
    import fsspec.core  # takes a tenth of a second, and the libraries behind it seconds

    try:
        files, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:  # an unknown protocol, a library that is not installed, or its own complaint
        raise ValueError(f"{VARIABLE}: no library here opens {url.partition('://')[0]}://: {told(error)}") from None
    except Exception as error:  # ftp, sftp and smb connect here already
        raise Away(told(error)) from None
    return files, str(root)


def _step_of(place: str) -> int:
    match = PLACE.fullmatch(place)
    if match is None:
        raise ValueError(f"{place!r:.100} is no place of a checkpoint")
    return int(match[3].removeprefix("step-"))


def _chunks(file: IO[bytes], limit: int) -> Iterator[bytes]:
    """At most `limit` bytes."""
    while limit > 0:
        with _answering():
            chunk = file.read(min(_CHUNK_BYTES, limit))
        if not chunk:
            return
        limit -= len(chunk)
        yield chunk


def _checked(file: IO[bytes], item: Item, name: str, go_on: Callable[[], bool]) -> Iterator[bytes]:
    """The file, piece by piece; after the last one NotWhole unless it was what the manifest says."""
    digest, size = hashlib.sha256(), 0
    for chunk in _chunks(file, item.size + 1):
        if not go_on():
            raise Interrupted
        digest.update(chunk)
        size += len(chunk)
        yield chunk
    if size != item.size or digest.hexdigest() != item.sha256:
        raise NotWhole(f"{name} is not what the manifest says")
