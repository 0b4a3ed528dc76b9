"""What the form of a new run can make of a run that exists (`?from=…&as=…`): its fine-tuning, a Mixture of Experts of it, its dense baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from django.http import Http404

from experiments.models import Run
from spec import successor
from spec.accounting import price
from spec.baseline import dense_baseline
from spec.experiment import ExperimentSpec


@dataclass(frozen=True)
class Successor:
    """What a run's spec becomes. `compared`: the page shows the run's price beside the new one."""

    title: str
    make: Callable[[ExperimentSpec, int], ExperimentSpec]
    compared: bool = False


CLONE = Successor("A clone of", lambda spec, run: spec)
SUCCESSORS = {
    "fine-tuning": Successor("Fine-tuning of", successor.fine_tuning),
    "upcycling": Successor("A Mixture of Experts upcycled from", successor.upcycling, compared=True),
    "baseline-flops": Successor("The dense baseline at equal FLOPs of", lambda spec, run: dense_baseline(spec, "flops"), compared=True),
    "baseline-params": Successor("The dense baseline at equal active parameters of", lambda spec, run: dense_baseline(spec, "params"), compared=True),
}


def wanted(word: str, parent: Run | None) -> Successor:
    """What `&as=` names. Raises Http404 for an unknown word, and where there is no run to make it of."""
    if not word:
        return CLONE
    if parent is None or word not in SUCCESSORS:
        raise Http404
    return SUCCESSORS[word]


def initial(parent: Run, made: Successor) -> dict[str, Any]:
    """The spec that the form begins with. Raises Http404 where the run has no such successor, or a spec of another version of the language."""
    stored: dict[str, Any] = parent.spec
    if made is CLONE:
        return stored
    try:
        spec = made.make(ExperimentSpec.model_validate(stored), parent.pk)
    except ValueError as error:
        raise Http404 from error
    plain: dict[str, Any] = spec.model_dump(mode="json")
    return plain


def compared_with(parent: Run | None, made: Successor) -> dict[str, Any] | None:
    """Name and price of the run beside which the page shows the new one's price; None for none."""
    if parent is None or not made.compared:
        return None
    return {"name": f"run {parent.pk}", "price": price(ExperimentSpec.model_validate(parent.spec)).model_dump()}
