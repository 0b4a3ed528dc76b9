"""Asks a run's checkpoint to go on from a prompt: one row; after the commit the workers' bell is rung."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.contrib.auth.models import User
from django.db import transaction

from experiments.actions.describe import Refused
from experiments.actions.transition import StateConflict, locked
from experiments.doorbell import ring_after_commit
from experiments.models import Generation, GenerationState, Run
from spec.problems import Problem

MAX_PROMPT, MAX_TOKENS = 4_000, 512
MAX_CHOICES = 65_536
"""Experts that an answer may name, one for each token, MoE layer and place among the top k: what a body of 1 MB holds."""
MAX_WAITING = 20
"""Generations of one run that may wait at once."""
WAITING = (GenerationState.QUEUED, GenerationState.RUNNING)


@transaction.atomic
def generate(
    run: Run,
    *,
    user: User,
    prompt: str,
    parameters: Mapping[str, Any],
    step: int | None = None,
    idempotency_key: str | None = None,
    body_sha256: str = "",
) -> Generation:
    """A queued generation from the run's checkpoint at `step`, or its newest. `parameters`: tokens, temperature, top_p, top_k, seed.

    Raises Refused for what this run cannot answer, StateConflict while it has no checkpoint or too much waits, and Run.DoesNotExist.
    """
    run = locked(run.pk)  # so that those who ask at once count each other
    saved = run.checkpoints.filter(deleted=False)
    if not saved.exists():
        raise StateConflict(run, "generate", "it has no checkpoint yet")
    if step is not None and not saved.filter(step=step).exists():
        raise Refused([Problem("/step", f"step: run {run.pk} has no checkpoint at step {step}")])
    _check_size(run, prompt, int(parameters["tokens"]))
    if run.generations.filter(state__in=WAITING).count() >= MAX_WAITING:
        raise StateConflict(run, "take another generation", f"{MAX_WAITING} are waiting, and each that ends makes room for one")
    made = Generation.objects.create(
        run=run,
        creator=user,
        prompt=prompt,
        parameters=dict(parameters),
        wanted_step=step,
        idempotency_key=idempotency_key,
        body_sha256=body_sha256,
    )
    ring_after_commit()
    return made


def _check_size(run: Run, prompt: str, tokens: int) -> None:
    """Raises Refused where the answer would name too many experts. A token is a byte of the prompt at least."""
    each = len(run.moe_layers) * max(1, run.top_k)
    most, given = MAX_CHOICES // max(1, each), len(prompt.encode()) + tokens
    if given > most:
        detail = f"tokens: with {each} experts for each token, prompt (in bytes) and tokens may have {most} together, not {given}"
        raise Refused([Problem("/tokens", detail)])
