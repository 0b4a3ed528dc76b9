"""The run whose weights another begins with: that it is there for who asks, has a checkpoint, and that its model fits."""

from __future__ import annotations

from django.db.models import QuerySet
from pydantic import ValidationError

from experiments.actions.describe import Refused, below
from experiments.models import Checkpoint, Run
from spec import start_fits
from spec.experiment import ExperimentSpec
from spec.problems import Problem


def origin(spec: ExperimentSpec, runs: QuerySet[Run], *, at: str = "/spec") -> Checkpoint | None:
    """The checkpoint that `spec.start` names by the number of one of `runs`; None where it names no run. Raises Refused.

    A run that is not among `runs` and one that does not exist get the same answer. What lies at a path, only the worker can see.
    """
    start = spec.start
    if (start.kind != "checkpoint" and start.kind != "upcycle") or start.run is None:
        return None
    run = runs.filter(pk=start.run).first()
    if run is None:
        raise Refused(below(at, [Problem("/start/run", f"run: there is no run {start.run} that you may see")]))
    kept = Checkpoint.objects.filter(run=run, deleted=False).order_by("-step", "-attempt")
    newest = kept.first()
    if newest is None or not run.spec:
        raise Refused(below(at, [Problem("/start/run", f"run: run {run.pk} has no checkpoint to start from")]))
    chosen = newest if start.step is None else kept.filter(step=start.step).first()
    if chosen is None:
        steps = ", ".join(str(step) for step in kept.values_list("step", flat=True).distinct()[:10])
        raise Refused(below(at, [Problem("/start/step", f"step: run {run.pk} has no checkpoint of step {start.step}, only of {steps}")]))
    problems = _misfits(spec, run)
    if problems:
        raise Refused(below(at, problems))
    return chosen


def settled(spec: ExperimentSpec, chosen: Checkpoint | None) -> ExperimentSpec:
    """`spec` with the step of the checkpoint that it starts from: the newest of today, whenever the run begins."""
    if chosen is None or spec.start.kind not in ("checkpoint", "upcycle"):
        return spec
    return spec.model_copy(update={"start": spec.start.model_copy(update={"step": chosen.step})})


def _misfits(spec: ExperimentSpec, run: Run) -> list[Problem]:
    try:
        source = ExperimentSpec.model_validate(run.spec)
    except ValidationError:
        return [Problem("/start/run", f"run: the spec of run {run.pk} is of another version of the language, so that its weights cannot be placed")]
    return start_fits.problems(spec, source, f"run {run.pk}")
