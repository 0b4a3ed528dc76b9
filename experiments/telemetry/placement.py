"""What a placement by load would make of a run: its measured loads over a window of steps, and who would hold what (`spec.placement`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.models import Run
from experiments.telemetry import read
from experiments.telemetry.read import Facts
from spec import placement
from spec.placement import Placement, balancedness

WINDOW_STEPS = 100
"""Where nobody says from where: routers move, and what they did long ago says little of what they do."""
MAX_SLOTS = 200_000
"""Layers x replicas of one answer."""


class PlacementError(ValueError):
    """The question cannot be answered; `parameter` is the one at fault, and the message names it and the limit."""

    def __init__(self, parameter: str, detail: str) -> None:
        super().__init__(detail)
        self.parameter = parameter


@dataclass(frozen=True)
class Loads:
    """`tokens` of each expert, float64[L, E], over the steps first … last; `steps` of them were reported."""

    tokens: NDArray[np.float64]
    first: int
    last: int
    steps: int


@dataclass(frozen=True)
class Asked:
    """What a placement is to be for: as in spec.placement.place."""

    devices: int
    replicas: int
    nodes: int
    groups: int


@dataclass(frozen=True)
class Placed:
    """The loads, what was asked, the placement, and the devices' loads, float64[L, V].

    `load_before` is that of equal, consecutive parts; None where devices do not divide the experts.
    """

    loads: Loads
    asked: Asked
    placement: Placement
    load_after: NDArray[np.float64]
    load_before: NDArray[np.float64] | None

    @property
    def balance(self) -> tuple[NDArray[np.float64] | None, NDArray[np.float64]]:
        """Balancedness [L], mean / largest device load, before and after."""
        return None if self.load_before is None else balancedness(self.load_before), balancedness(self.load_after)


def loads(run: Run, first: int | None, last: int | None) -> Loads | None:
    """Over the steps first … last, by default the last WINDOW_STEPS; None where there is no load.

    Many steps are read from roll-ups: `first` and `last` then reach out to the bounds of buckets. Raises PlacementError.
    """
    facts = Facts.of(run)
    high = facts.last if last is None else min(last, facts.last)
    low = max(high - WINDOW_STEPS + 1, 1) if first is None else first
    if first is not None and last is not None and first > last:
        raise PlacementError("from", f"from {first} is after to {last}")
    try:
        at = read.zoom(facts, low, high, read.MAX_POINTS, ["expert_tokens"])
    except read.RangeError as error:
        raise PlacementError("from", f"from {low} to {high}: {error.detail}") from error
    found = read.tensors(facts, "expert_tokens", at.level, at.low, at.high)
    if not len(found) or found.sums.ndim != 3 or not found.sums.any():
        return None
    return Loads(found.sums.sum(axis=0, dtype=np.float64), at.first, at.last, int(found.n.sum()))


def asked(run: Run, n_experts: int, devices: int | None, replicas: int | None, nodes: int | None, groups: int | None) -> Asked:
    """What is asked for, and, where it is None, what the run itself has: its ranks that share experts (where it has but one, a node's eight, or
    as many as divide the experts), as few places as hold every expert, its router's groups."""
    spec = run.spec if isinstance(run.spec, Mapping) else {}
    if devices is None:
        ranks = _number(spec, "parallel", "expert")
        devices = ranks if ranks > 1 else next(v for v in (8, 4, 2, 1) if n_experts % v == 0)
    if replicas is None:
        replicas = -(-n_experts // devices) * devices
    if groups is None:
        groups = max(_number(spec, "model", "moe", "router", "n_groups"), 1)
    return Asked(devices, replicas, 1 if nodes is None else nodes, groups)


def _number(spec: Any, *path: str) -> int:
    for key in path:
        spec = spec.get(key) if isinstance(spec, Mapping) else None
    return spec if isinstance(spec, int) and spec > 0 else 0


def placed(measured: Loads, wanted: Asked) -> Placed:
    """The placement for these loads. Raises PlacementError."""
    layers, n_experts = measured.tokens.shape
    if layers * wanted.replicas > MAX_SLOTS:
        detail = f"replicas {wanted.replicas} in {layers} layers are {layers * wanted.replicas} slots; the limit is {MAX_SLOTS}"
        raise PlacementError("replicas", detail)
    if wrong := placement.problem(n_experts, wanted.replicas, wanted.groups, wanted.nodes, wanted.devices):
        raise PlacementError(wrong.split()[0], wrong)
    made = placement.place(measured.tokens, wanted.replicas, wanted.groups, wanted.nodes, wanted.devices)
    before = None
    if n_experts % wanted.devices == 0:
        before = placement.plain(layers, n_experts, wanted.devices).device_load(measured.tokens)
    return Placed(measured, wanted, made, made.device_load(measured.tokens), before)
