"""A trainer without a model, for tests of everything around it: `MOELAB_TRAINER=tests.workers.fake_trainer`.

It keeps the whole of docs/protocol.md, section 2 (events, checkpoints, signals, exit codes, resuming), and every value that it
reports is a function of the step alone, so that an interrupted run must end up equal to an undisturbed one.

    FAKE_STEP_S=0.05          seconds for each step
    FAKE_CHECKPOINT_EVERY=10  steps
    FAKE_EXIT_AT=7:70         exit with a code after a step       FAKE_HANG_AT=7   sleep for ever after it
    FAKE_IGNORE_SIGTERM=1     never stop                          FAKE_CHILD=1     leave a child process behind
    FAKE_LAST_WORDS=…         ranks but the first print them and abort when the first has ended
"""

from __future__ import annotations

import argparse
import faulthandler
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from spec import events, spool

LAYERS, EXPERTS, TOP_K, TOKENS = 2, 4, 2, 256
NAMES = ["loss", "lm_loss", "grad_norm", "tokens_per_s"]


def scalars(step: int) -> np.ndarray:
    """float32[4]: what the trainer reports for a step."""
    loss = 5.0 / (1.0 + 0.01 * step)
    return np.array([loss + 0.01, loss, 1.0 / step, TOKENS], dtype=np.float32)


def expert_tokens(step: int) -> np.ndarray:
    """uint32[layer, expert], each row the sum of tokens x top_k."""
    shares = np.random.default_rng(step).multinomial(TOKENS * TOP_K, np.full(EXPERTS, 1 / EXPERTS), size=LAYERS)
    return shares.astype(np.uint32)


class FakeTrainer:
    def __init__(self, spec: dict, out: Path, attempt: int) -> None:
        self.steps = int(spec["training"]["steps"])
        self.out, self.attempt = out, attempt
        self.stop = self.save = False
        self.spool = spool.Writer(out / "attempts" / str(attempt) / "events.spool")
        self.every = int(os.environ.get("FAKE_CHECKPOINT_EVERY", "10"))
        if not os.environ.get("FAKE_IGNORE_SIGTERM"):
            signal.signal(signal.SIGTERM, lambda *_: setattr(self, "stop", True))
        else:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGUSR1, lambda *_: setattr(self, "save", True))

    def say(self, event: events.Event) -> None:
        self.spool.append(events.encode(event))

    def newest_checkpoint(self) -> int | None:
        found = [path for path in sorted(self.out.glob("checkpoints/step-*/MANIFEST.json")) if "." not in path.parent.name]
        return int(found[-1].parent.name.removeprefix("step-")) if found else None

    def checkpoint(self, step: int) -> None:
        began = time.monotonic()
        final = self.out / "checkpoints" / f"step-{step:08d}"
        if final.exists():
            return
        partial = final.with_name(final.name + f".attempt-{self.attempt}.tmp")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        state = json.dumps({"step": step, "attempt": self.attempt}).encode()
        (partial / "state.json").write_bytes(state)
        files = {"state.json": {"size": len(state), "sha256": hashlib.sha256(state).hexdigest()}}
        manifest = json.dumps({"format": 1, "step": step, "files": files}).encode()
        (partial / "MANIFEST.json").write_bytes(manifest)
        partial.rename(final)
        digest = hashlib.sha256(manifest).hexdigest()
        self.say(
            events.CheckpointSaved(step=step, at=time.time(), path=str(final), size_bytes=len(state), sha256=digest, seconds=time.monotonic() - began)
        )

    def end(self, code: int, reason: str, detail: str = "") -> int:
        outcome = {0: "succeeded", 75: "paused"}.get(code, "failed")
        path = self.out / "attempts" / str(self.attempt) / "result.json"
        path.write_text(json.dumps({"outcome": outcome, "reason": reason, "detail": detail}))
        self.spool.sync()
        return code

    def run(self) -> int:
        resumed = self.newest_checkpoint()
        self.say(
            events.RunStarted(
                attempt=self.attempt, at=time.time(), resumed_from_step=resumed, devices=[os.environ.get("MOELAB_DEVICE", "cpu")],
                total_params=1000, active_params=500, tokens_per_step=TOKENS, steps=self.steps, moe_layers=list(range(LAYERS)),
                n_experts=EXPERTS, top_k=TOP_K,
            )
        )  # fmt: skip
        self.say(events.MetricsDeclared(names=NAMES))
        exit_at, exit_code = (int(part) for part in os.environ.get("FAKE_EXIT_AT", "0:0").split(":"))
        for step in range((resumed or 0) + 1, self.steps + 1):
            time.sleep(float(os.environ.get("FAKE_STEP_S", "0.05")))
            self.say(events.StepDone(step=step, at=time.time(), scalars=scalars(step), tensors={"expert_tokens": expert_tokens(step)}))
            print(f"step {step} \x1b[31mred\x1b[0m", flush=True)
            if step == int(os.environ.get("FAKE_HANG_AT", "0")):
                time.sleep(3600)
            if step == exit_at:
                return self.end(exit_code, "error", f"told to exit at step {step}")
            if self.stop or self.save or (self.every and step % self.every == 0) or step == self.steps:
                self.save = False
                self.checkpoint(step)
            if self.stop:
                return self.end(75, "stopped")
        return self.end(0, "finished")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("spec", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--attempt", type=int, default=0)
    args = parser.parse_args()
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    if os.environ.get("FAKE_CHILD"):
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"], start_new_session=True)
    if os.environ.get("RANK", "0") != "0":  # the other ranks keep the first one company
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        print("waits", flush=True)
        marker = args.out / "attempts" / str(args.attempt) / "result.json"
        while not marker.exists():
            time.sleep(0.02)
        if words := os.environ.get("FAKE_LAST_WORDS"):
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            print(words, file=sys.stderr, flush=True)
            os.abort()
        return 0 if "finished" in marker.read_text() else 75
    return FakeTrainer(json.loads(args.spec.read_text()), args.out, args.attempt).run()


if __name__ == "__main__":
    sys.exit(main())
