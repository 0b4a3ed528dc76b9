"""Storage that hosts share for checkpoints: its URL, and the names in it.

    <URL>/run-12-5f3a9c1e/attempt-2/step-00000100/              what the checkpoint's directory holds; the manifest is written last
    <URL>/run-12-5f3a9c1e/attempt-2/tokenizer-<SHA-256>.json    where the run's text is not told into bytes

The digits behind a run's number are made of the time of its submission: another server, or a database that began anew, may count its runs
in the same storage. An attempt writes under its own number alone, so that two that are alive at once never write to one name.
"""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, StringConstraints

MAX_CHARS = 500
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL | re.IGNORECASE)
_SAME = {"local": "file", "s3a": "s3", "gcs": "gs"}
_UNFIT = {"memory": "one process alone sees what is in it", "http": "it is for reading only", "https": "it is for reading only"}
_FOLDER = r"run-[1-9][0-9]{0,18}-[0-9a-f]{8}"
_ATTEMPT = r"attempt-[1-9][0-9]{0,9}"
PLACE = re.compile(f"({_FOLDER})/({_ATTEMPT})/(step-[0-9]{{8,10}})")


def normalised(url: str) -> str:
    """`url` as every host writes it: no default spelling left, no slash at the end. Raises ValueError, whose text never has the URL in it."""
    match = _SCHEME.fullmatch(url.strip())
    if match is None:
        raise ValueError("must be a URL such as file:///shared/checkpoints or s3://bucket/prefix")
    scheme, rest = _SAME.get(match[1].lower(), match[1].lower()), match[2]
    if ":" in rest.rpartition("@")[0]:
        raise ValueError("must have no password in it: what the storage lets in is for its library's own environment or files")
    if "::" in url or any(char in rest for char in "?#") or not rest.isprintable():
        raise ValueError("must be a plain URL: no chain (::), no query (?), no fragment (#), no control character")
    if len(url) > MAX_CHARS:
        raise ValueError(f"must have {MAX_CHARS} characters at most, not {len(url)}")
    if scheme in _UNFIT:
        raise ValueError(f"must not begin with {scheme}://: {_UNFIT[scheme]}")
    host, path = urlsplit(f"x://{rest}").netloc, [part for part in rest.partition("/")[2].split("/") if part]
    if scheme == "file" and (host or not path):
        raise ValueError("must name a directory by its whole path: file:///shared/checkpoints")
    if scheme != "file" and not host:
        raise ValueError(f"must name a bucket or host: {scheme}://bucket/prefix")
    if any(part in (".", "..") for part in path):
        raise ValueError("must have neither . nor .. in its path")
    return "/".join([f"{scheme}://{host}", *path])


StorageURL = Annotated[str, StringConstraints(max_length=MAX_CHARS), AfterValidator(lambda url: normalised(url) if url else "")]
"""Normalised; "" for none."""
Place = Annotated[str, StringConstraints(pattern=f"^{PLACE.pattern}$")]
Folder = Annotated[str, StringConstraints(pattern=f"^({_FOLDER})?$")]


def folder(run: int, submitted: datetime) -> str:
    """The folder of a run's checkpoints."""
    moment = submitted.astimezone(UTC).isoformat(timespec="microseconds")
    return f"run-{run}-{hashlib.sha256(f'{run} {moment}'.encode()).hexdigest()[:8]}"


def place(of_run: str, attempt: int, step: int) -> str:
    """Where in the storage a checkpoint lies; `of_run` is its run's folder."""
    return f"{of_run}/attempt-{attempt}/step-{step:08d}"
