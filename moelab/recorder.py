"""Records a run of any trainer, so that its routing can be watched like that of our own.

    from moelab import Recorder

    with Recorder("my run", moe_layers=range(16), n_experts=64, top_k=8) as recorder:
        for step in range(1, 1001):
            ...
            recorder.log(step, {"loss": loss}, expert_tokens=counts)      # counts: integers [layers, experts]

`log` writes to a file and returns; a thread ships the file to the server. With the server away nothing waits and nothing is
lost: what has not arrived when the process ends is shipped by `moelab spool sync`.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moelab.client import ApiError, Client, ServerUnreachable
from moelab.recording import Facts, Recording
from moelab.shipper import Denied, Fenced, Shipper
from spec import events, spool

logger = logging.getLogger(__name__)

MAX_SCALARS = 500


class Recorder:
    """One recorded run. Not for several threads or processes at once: rank 0 records."""

    def __init__(
        self,
        name: str,
        *,
        project: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        moe_layers: Iterable[int] = (),
        n_experts: int = 0,
        top_k: int = 0,
        steps: int = 0,
        total_params: int = 0,
        active_params: int = 0,
        tokens_per_step: int = 0,
        server: str | None = None,
        token: str | None = None,
    ) -> None:
        """`moe_layers` are the model's indices of the rows of `expert_tokens`; `steps` is how many there will be, 0 if nobody knows.

        The token (scope `ingest` and `write`) and the server are found as by `Client`. Raises OSError if MOELAB_HOME cannot be written.
        """
        self._shape = (len(layers := list(moe_layers)), n_experts)
        self._server, self._token = server, token
        self._recording = Recording.create(Facts(name=name, project=project, tags=list(tags), notes=notes))
        self._writer = spool.Writer(self._recording.spool_path)
        self._names: list[str] = []
        self._last_step = 0
        self._dropped = 0
        self._finished = False
        self._shipper: Shipper | None = None
        self._last_seq: int | None = None
        self._write(
            events.RunStarted(
                attempt=0, at=time.time(), moe_layers=layers, n_experts=n_experts, top_k=top_k, steps=steps,
                total_params=total_params, active_params=active_params, tokens_per_step=tokens_per_step,
            )
        )  # fmt: skip
        self._thread = threading.Thread(target=self._ship, name="moelab-recorder", daemon=True)
        self._thread.start()
        atexit.register(self._at_exit)

    @property
    def run(self) -> int | None:
        """The run's number; None until the server has given one."""
        return self._recording.facts.run

    def log(self, step: int, scalars: Mapping[str, float], expert_tokens: ArrayLike | None = None, **tensors: ArrayLike) -> None:
        """One step, numbered from 1 and rising. `expert_tokens` is integers [layer, expert]: tokens routed to each, before any drop.

        Other tensors of spec.events.TENSORS by name (`router_prob`, `dropped`, …). Raises ValueError for what does not fit; a full
        disk is told in the log, not raised.
        """
        if self._finished:
            raise ValueError("this recorder has finished")
        if not self._last_step < step < 2**31:
            raise ValueError(f"step {step} does not follow step {self._last_step}")
        given = {"expert_tokens": expert_tokens, **tensors}
        arrays = {name: self._tensor(name, value) for name, value in given.items() if value is not None}
        new = [name for name in scalars if name not in self._names]
        if len(self._names) + len(new) > MAX_SCALARS:
            raise ValueError(f"{len(self._names) + len(new)} scalars > limit {MAX_SCALARS}")
        values = {name: float(value) for name, value in scalars.items()}
        if new:
            self._names += new
            self._write(events.MetricsDeclared(names=self._names))
        row = np.array([values.get(name, np.nan) for name in self._names], dtype=np.float32)
        self._write(events.StepDone(step=step, at=time.time(), scalars=row, tensors=arrays))
        self._last_step = step

    def finish(self, outcome: Literal["succeeded", "failed", "cancelled"] = "succeeded", *, detail: str = "", timeout_s: float = 30.0) -> bool:
        """Ends the run and waits until the server has everything, at most `timeout_s`. False if `moelab spool sync` has to do the rest."""
        if self._finished:
            return not self._thread.is_alive()
        self._finished = True
        atexit.unregister(self._at_exit)
        self._write(events.RunEnded(at=time.time(), outcome=outcome, reason="finished" if outcome == "succeeded" else "error", detail=detail))
        self._writer.sync()
        self._last_seq = self._writer.last_seq
        self._writer.close()
        if self._shipper is not None:
            self._shipper.finish(self._last_seq)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            logger.warning("run %s has not reached the server yet; `moelab spool sync` ships the rest", self.run or self._recording.facts.name)
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.finish()
        else:
            self.finish("cancelled" if isinstance(error, KeyboardInterrupt) else "failed", detail=f"{type(error).__name__}: {error}"[:4000])

    def _at_exit(self) -> None:
        self.finish("failed", detail="the process ended without finish()", timeout_s=5.0)

    def _tensor(self, name: str, value: ArrayLike) -> NDArray[Any]:
        kind = events.TENSORS.get(name)
        if kind is None:
            raise ValueError(f"tensor {name!r} is none of {', '.join(events.TENSORS)}")
        found = np.asarray(value)
        if kind.axes == ("layer", "expert") and found.shape != self._shape:
            raise ValueError(f"{name} has shape {list(found.shape)}, not {list(self._shape)} (moe_layers, n_experts)")
        if found.ndim != len(kind.axes):
            raise ValueError(f"{name} has {found.ndim} axes, not {len(kind.axes)} ({', '.join(kind.axes)})")
        if kind.dtype == "uint32" and found.size and (found.min() < 0 or found.max() >= 2**32):
            raise ValueError(f"{name} holds counts from 0 to {2**32 - 1}")
        return found.astype(kind.dtype)

    def _write(self, event: events.Event) -> None:
        try:
            self._writer.append(events.encode(event))
        except OSError as error:
            self._dropped += 1
            if self._dropped == 1:
                logger.warning("the recording's disk takes no more, steps are being dropped: %s", error)

    def _ship(self) -> None:
        """The thread: gets a run from the server, then ships until the end."""
        wait_s = 0.5
        while True:
            try:
                with Client(self._server, self._token) as client:
                    self._recording.begin_run(client)
                break
            except ServerUnreachable:
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, 15.0)
            except ApiError as error:
                logger.warning("the server does not take this recording: %s", error)
                return
        self._shipper = self._recording.shipper(self._server, self._token)
        if self._last_seq is not None:
            self._shipper.finish(self._last_seq)
        try:
            asyncio.run(self._shipper.run())
        except Denied as error:
            logger.warning("run %s: %s; with a token of scope `ingest`, `moelab spool sync` ships the recording", self.run, error)
            return
        except Fenced:
            logger.warning("run %s was ended on the server; the recording goes nowhere", self.run)
            return
        self._recording.discard()
