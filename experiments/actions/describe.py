"""From what a client sends (a spec or a preset, and single values over it) to a spec, or to the list of its problems."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.conf import settings
from pydantic import ValidationError

from spec.accounting import Price, check_size, price
from spec.experiment import ExperimentSpec
from spec.overrides import OverrideError, apply
from spec.problems import Problem, from_validation_error, pointer
from spec.trainable import problems as untrainable


class Refused(Exception):  # noqa: N818
    """The description is not one that can be run. `problems` point into the request's body."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(problem.detail for problem in problems))
        self.problems = problems


def below(prefix: str, problems: list[Problem]) -> list[Problem]:
    """The problems with their pointers moved below `prefix`."""
    return [Problem(prefix + problem.pointer, problem.detail) for problem in problems]


def resolve(plain: Mapping[str, Any], overrides: Mapping[str, Any], *, at: str = "/spec", overrides_at: str = "/overrides") -> ExperimentSpec:
    """The spec of `plain` with each dotted path of `overrides` set. Raises Refused, pointing at `at` or `overrides_at`."""
    try:
        return ExperimentSpec.model_validate(apply(plain, overrides))
    except OverrideError as error:
        raise Refused([Problem(overrides_at + pointer(error.path), str(error))]) from error
    except ValidationError as error:
        raise Refused([_at_override(problem, overrides, at, overrides_at) for problem in from_validation_error(error)]) from error


def check(spec: ExperimentSpec, *, at: str = "/spec") -> Price:
    """The price of a spec that can be run here. Raises Refused if the trainer cannot take it or it is over the limit."""
    problems = untrainable(spec) + check_size(spec, max_params=settings.MOELAB_MAX_PARAMS)
    if problems:
        raise Refused(below(at, problems))
    return price(spec)


def _at_override(problem: Problem, overrides: Mapping[str, Any], at: str, overrides_at: str) -> Problem:
    """A problem at a value that an override has set belongs to the override."""
    for path in overrides:
        place = pointer(*path.split("."))
        if problem.pointer == place or problem.pointer.startswith(place + "/"):
            return Problem(overrides_at + pointer(path) + problem.pointer[len(place) :], problem.detail)
    return Problem(at + problem.pointer, problem.detail)
