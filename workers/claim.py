"""What the server hands to a worker that takes a run (docs/protocol.md, section 3), as it is handed on to the supervisor."""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from moelab.connection import find_server
from spec.storage import Folder, Place


class Held(BaseModel):
    """A checkpoint of the run's that counts: the SHA-256 of its manifest, and its place in this worker's storage, if it is there."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    attempt: int = Field(ge=1)
    step: int = Field(ge=0)
    sha256: str
    place: Place | None = None

    @property
    def age(self) -> tuple[int, int]:
        """What is greater is newer: a later attempt may go on from before what an earlier one has saved."""
        return self.attempt, self.step


class Start(BaseModel):
    """A checkpoint of another run that a run begins from. `sha256` and `place` are as in Held, where the server knows the checkpoint."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    run: int = Field(ge=1)
    step: int = Field(ge=0)
    sha256: str = ""
    place: Place | None = None


class Claim(BaseModel):
    """A run, the attempt at it that this host may make, and the token for that attempt's telemetry.

    Of `nodes` hosts that share the run this is number `node`; its ranks follow those of the hosts before it. `resume_from` becomes the run's
    own first checkpoint, `start` is what its spec takes weights from. `trained` is the last attempt that trained, `stored_as` the run's folder
    in a storage.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    run: int = Field(ge=1)
    attempt: int = Field(ge=1)
    token: str = Field(repr=False)
    spec: dict[str, Any]
    devices: list[str] = Field(min_length=1)
    node: int = Field(0, ge=0)
    nodes: int = Field(1, ge=1)
    resume_from: Start | None = None
    start: Start | None = None
    checkpoints: list[Held] = Field(default_factory=list)
    trained: int = Field(0, ge=0)
    stored_as: Folder = ""
    ingest_url: str

    def socket_url(self) -> str:
        """The ingest WebSocket at the server as it is known now: a server that comes back may listen at another port."""
        server = urlsplit(find_server().server)
        scheme = "wss" if server.scheme == "https" else "ws"
        path = urlsplit(self.ingest_url).path
        return f"{scheme}://{server.netloc}{path}?attempt={self.attempt}" + (f"&node={self.node}" if self.node else "")

    def last_word_url(self) -> str:
        """Where a node that was fenced says how its ranks ended."""
        return f"{self.socket_url()}&last_word=1"

    @property
    def first_rank(self) -> int:
        """The number of this host's first rank."""
        return self.node * len(self.devices)

    def threads(self) -> int:
        """CPU threads for one rank: what the spec asks for, else this host's cores shared among its ranks, or its slots."""
        asked = int(self.spec.get("parallel", {}).get("threads", 0))
        sharers = max(len(self.devices), int(os.environ.get("MOELAB_SLOTS", "1")))
        return asked or max(1, len(os.sched_getaffinity(0)) // sharers)
