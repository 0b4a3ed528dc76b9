"""A worker host without a trainer: claims runs over REST and speaks the ingest protocol with made-up routing.

Steps come as fast as the test wants and show what the pages must show: a router that goes out of balance, an expert that
dies, a spike. The server cannot tell it from the real thing.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
import numpy as np
from websockets.sync.client import ClientConnection, connect

from spec.events import (
    PARTS,
    CheckpointSaved,
    EvalDone,
    Event,
    MetricsDeclared,
    RunEnded,
    RunStarted,
    SpecialisationCounted,
    SpikeDetected,
    StepDone,
    encode,
)

NAMES = ["loss", "lm_loss", "balance/switch_aux", "grad_norm", "lr", "tokens_per_s", "step_ms", "tflop_per_s", "mfu"]
NAMES += ["max_vio", "load_cv", "router_entropy", "dead_experts", "dropped_share"]
TOKENS = 2048
SPIKE_AT = 0.62


class MadeUpRun:
    """One claimed run and the router that it pretends to have."""

    def __init__(self, claim: Mapping[str, Any], seed: int = 0) -> None:
        spec = claim["spec"]
        moe = spec["model"]["moe"]
        self.run, self.attempt, self.token, self.url = claim["run"], claim["attempt"], claim["token"], claim["ingest_url"]
        self.steps: int = spec["training"]["steps"]
        self.experts: int = moe["n_experts"]
        self.ranks: int = spec["parallel"]["expert"]
        self.sample_every: int = spec["telemetry"]["phases_every"]
        self.top_k: int = moe["top_k"]
        self.layers = list(range(moe["first_k_dense"] + moe["every"] - 1, spec["model"]["n_layers"], moe["every"]))
        self.random = np.random.default_rng(seed)
        self.taste = self.random.normal(0, 0.55, (len(self.layers), self.experts))
        self.seq = 0
        self.socket: ClientConnection | None = None

    def opening(self) -> list[Event]:
        """What an attempt says first."""
        started = RunStarted(
            attempt=self.attempt,
            at=time.time(),
            world_size=self.ranks,
            devices=["NVIDIA H100 80GB HBM3"] * self.ranks,
            total_params=4_207_872,
            active_params=1_848_576,
            tokens_per_step=TOKENS,
            steps=self.steps,
            moe_layers=self.layers,
            n_experts=self.experts,
            top_k=self.top_k,
            balance_terms=["switch_aux"],
            phases=["forward", "backward"],
            ops={"grouped_gemm": "torch", "permute": "torch"},
            versions={"torch": "2.13.0", "python": "3.11"},
        )
        return [started, MetricsDeclared(names=NAMES)]

    def step(self, step: int) -> Iterator[Event]:
        """One step and what happens at it."""
        at = step / self.steps
        spiking = abs(at - SPIKE_AT) < 0.006
        logits = self.taste * (1.4 * np.exp(-3 * at) + 0.25 + (1.6 if spiking else 0)) + self.random.normal(0, 0.06, self.taste.shape)
        if at > 0.4:
            logits[-1, 1] = -30
        prob = np.exp(logits)
        prob /= prob.sum(1, keepdims=True)
        tokens = np.stack([self.random.multinomial(TOKENS * self.top_k, row) for row in prob]).astype(np.uint32)
        dropped = np.maximum(tokens.astype(np.int64) - int(1.25 * TOKENS * self.top_k / self.experts), 0).astype(np.uint32)
        ratio = tokens / tokens.mean(1, keepdims=True)
        loss = 1.55 + 4.0 * np.exp(-6 * at) + self.random.normal(0, 0.03) + (1.1 if spiking else 0)
        entropy = -(prob * np.log(np.maximum(prob, 1e-30))).sum(1)
        vio = ratio.max(1) - 1
        scalars = [loss + 0.02, loss, 0.01 * float(vio.mean()), 0.6 + 2 * np.exp(-8 * at) + self.random.gamma(2, 0.05)]
        scalars += [3e-3 * min(1, step / 20) * (0.55 + 0.45 * np.cos(np.pi * at)), 21_000 + self.random.normal(0, 600), 97 + self.random.normal(0, 3)]
        tflop_per_s = 415 + self.random.normal(0, 6)
        scalars += [tflop_per_s, tflop_per_s / 989]
        scalars += [vio.mean(), ratio.std(1).mean(), entropy.mean(), (tokens == 0).sum(), dropped.sum() / tokens.sum()]
        tensors = {"expert_tokens": tokens, "router_prob": prob.astype(np.float32), "dropped": dropped, "router_entropy": entropy.astype(np.float32)}
        tensors["balance_loss"] = (ratio * prob).sum(1, keepdims=True).astype(np.float32)
        tensors |= self._of_ranks(step, tokens)
        yield StepDone(step=step, at=time.time(), scalars=np.array(scalars, np.float32), tensors=tensors)
        if spiking and step == round(SPIKE_AT * self.steps):
            router = [self._layer(i, ratio[i], float(entropy[i])) for i in range(len(self.layers))]
            yield SpikeDetected(
                step=step, at=time.time(), loss=float(loss), median=1.7, deviation=0.05, score=(float(loss) - 1.7) / 0.05, router=router
            )
        if step % max(self.steps // 5, 1) == 0:
            yield EvalDone(
                step=step,
                at=time.time(),
                loss=float(loss) + 0.08,
                by_domain={"code": float(loss) - 0.1, "prose": float(loss) + 0.2},
                bits_per_byte=1.44,
                batch_dependence=0.031,
            )
            yield self._specialisation(step, prob)
            path = f"/var/lib/moelab/runs/{self.run}/checkpoints/step-{step:08d}"
            yield CheckpointSaved(step=step, at=time.time(), path=path, size_bytes=50_331_648, sha256="ab" * 32, seconds=0.4)

    def _of_ranks(self, step: int, tokens_LE: np.ndarray[Any, Any]) -> dict[str, np.ndarray[Any, Any]]:
        """Every rank's time, the second one's longer; and, where there are several, equal parts of the tokens to those that hold the experts."""
        tensors = {"phase_ms": np.array([[40 + 10 * rank, 80] for rank in range(self.ranks)], np.float32)}
        if step % self.sample_every == 0:
            tensors["part_ms"] = np.array(
                [[[4, 8] if part != "waiting" else [9 - 9 * rank, 3] for part in PARTS] for rank in range(self.ranks)], np.float32
            )
        if self.ranks > 1:
            held = tokens_LE.reshape(len(tokens_LE), self.ranks, -1).sum(2) // self.ranks
            tensors["rank_traffic"] = np.repeat(held[:, None, :], self.ranks, axis=1).astype(np.uint32)
            if step % self.sample_every == 0:
                tensors["sent_bytes"] = np.full(self.ranks, 1e6, np.float32)
        return tensors

    def _specialisation(self, step: int, prob_LE: np.ndarray[Any, Any]) -> SpecialisationCounted:
        """Each class of token and each domain has a taste of its own, which grows with the steps."""
        groups = {"classes": {"keyword": 900, "name": 8000, "operator": 2500, "space": 7000}, "domains": {"code": 9000, "prose": 9400}}
        tokens = {}
        for name, group in groups.items():
            taste = np.random.default_rng(len(group)).normal(0, 2 * step / self.steps, (*prob_LE.shape, len(group)))
            shares = prob_LE[:, :, None] * np.exp(taste)
            shares *= self.top_k / shares.sum(1, keepdims=True)
            tokens[name] = (np.minimum(shares, 1) * np.array(list(group.values()))).astype(np.uint32)
        return SpecialisationCounted(step, time.time(), groups["classes"], groups["domains"], tokens["classes"], tokens["domains"])

    def _layer(self, row: int, ratio: np.ndarray[Any, Any], entropy: float) -> dict[str, float]:
        """What a spike says of one layer."""
        vio, top = float(ratio.max()) - 1, int(ratio.argmax())
        described = {"layer": self.layers[row], "max_vio": vio, "max_vio_before": vio * 0.4, "dead": int((ratio == 0).sum())}
        return {**described, "top_expert": top, "top_share": float(ratio.max()) / self.experts, "entropy": entropy}

    # ----- the wire

    def send(self, events: list[Event], log: str = "") -> None:
        """Sends the events and waits until they are stored."""
        socket = self._connected()
        records = b"".join(struct.pack("<II", len(payload), zlib.crc32(payload)) + payload for payload in map(encode, events))
        if records:
            self.seq += len(events)
            socket.send(b"E" + struct.pack("<I", self.attempt) + records)
            while (heard := json.loads(socket.recv(timeout=20)))["type"] != "ack" or heard["seq"] < self.seq:
                if heard["type"] in ("refused", "fenced"):
                    raise RuntimeError(str(heard))
        if log:
            data = log.encode()
            socket.send(b"L" + struct.pack("<Q", self._logged) + data)
            self._logged += len(data)

    def train(self, first: int = 1, last: int | None = None, *, batch: int = 25, pause_s: float = 0.0) -> None:
        """Steps `first` … `last`, some at a time."""
        for start in range(first, (last or self.steps) + 1, batch):
            stop = min(start + batch, (last or self.steps) + 1)
            lines = "".join(
                f"step {step:>6}  loss {1.55 + 4 * np.exp(-6 * step / self.steps):.3f}\n" for step in range(start, stop) if step % 10 == 0
            )
            self.send([event for step in range(start, stop) for event in self.step(step)], lines)
            self.heartbeat()
            time.sleep(pause_s)

    def end(self, outcome: str = "succeeded", reason: str = "finished", detail: str = "") -> None:
        """The attempt's last word."""
        self.send([RunEnded(at=time.time(), outcome=outcome, reason=reason, detail=detail, exit_code=0)])
        self.close()

    def heartbeat(self) -> None:
        """Renews the lease."""
        self._connected().send('{"type":"heartbeat"}')

    def close(self) -> None:
        """Leaves the line."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    _logged = 0

    def _connected(self) -> ClientConnection:
        if self.socket is None:
            self.socket = connect(self.url, additional_headers={"Authorization": f"Bearer {self.token}"}, max_size=None)
            hello = json.loads(self.socket.recv(timeout=20))
            self.seq = hello["acked"].get(str(self.attempt), 0)
            self._logged = hello["log_offset"]
        return self.socket


class MadeUpHost:
    """The host: says hello with its devices and claims what is queued."""

    def __init__(self, server: str, token: str) -> None:
        self.api = httpx.Client(base_url=f"{server}/api/v1", headers={"Authorization": f"Bearer {token}"}, timeout=20)
        self.worker = 0

    def hello(self) -> None:
        """A sign of life."""
        devices = [{"kind": "cuda", "index": i, "name": "NVIDIA H100 80GB HBM3", "memory_bytes": 85_899_345_920} for i in range(4)]
        body = {"name": "bench-1", "host": "bench-1.local", "pid": 4711, "version": "0.1.0", "devices": devices, "slots": 4}
        self.worker = self.api.post("/worker/hello", json=body).raise_for_status().json()["worker"]

    def claim(self, devices: list[str], seed: int = 0, wait_s: float = 20.0) -> MadeUpRun:
        """The next run in the queue. With `cuda` devices only: what runs on a CPU is left to the real worker."""
        deadline = time.monotonic() + wait_s
        while True:
            answer = self.api.post("/worker/claim", json={"worker": self.worker, "free_slots": 1, "free_devices": devices}).raise_for_status()
            if answer.status_code == 200:
                return MadeUpRun(answer.json(), seed)
            if time.monotonic() > deadline:
                raise TimeoutError("nothing was queued")
            time.sleep(0.1)
