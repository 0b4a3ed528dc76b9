"""Which device holds which experts, by their load: what is hot is held several times, and the copies are packed evenly (EPLB, DeepSeek 2025).

Hierarchical, where nodes divide the groups that routing is limited to: whole groups go to nodes, then each node copies and packs its own
experts, so that a token's groups lie on few nodes. Else global: copied and packed over all devices, whatever the groups.

Letters: L layers, E experts, S slots (a slot holds one expert; device v of V has slots v * S / V to (v + 1) * S / V - 1).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Policy = Literal["hierarchical", "global", "plain"]


@dataclass(frozen=True)
class Placement:
    """`expert_LS` int64: the expert in each slot. Each expert has a slot at least; its tokens are shared evenly by its copies."""

    expert_LS: NDArray[np.int64]
    n_experts: int
    devices: int
    policy: Policy

    @property
    def copies_LE(self) -> NDArray[np.int64]:
        """int64[L, E]: how often each expert is held."""
        return np.stack([np.bincount(expert_S, minlength=self.n_experts) for expert_S in self.expert_LS])

    def device_load(self, load_LE: NDArray[Any]) -> NDArray[np.float64]:
        """float64[L, V]: the load of each device, in the unit of `load_LE`."""
        share_LE = load_LE / self.copies_LE
        slot_LS = np.take_along_axis(share_LE, self.expert_LS, axis=1)
        summed: NDArray[np.float64] = slot_LS.reshape(len(slot_LS), self.devices, -1).sum(axis=2)
        return summed

    def on_device(self, layer: int, device: int) -> list[int]:
        """The experts that `device` holds in a layer (a row), by slot."""
        size = self.expert_LS.shape[1] // self.devices
        return [int(expert) for expert in self.expert_LS[layer, device * size : (device + 1) * size]]


def balancedness(device_load_LV: NDArray[Any]) -> NDArray[np.float64]:
    """float64[L]: mean / largest load of a device: 1 is even, 1 / V is everything on one. 1 where there is no load."""
    most_L = device_load_LV.max(axis=1)
    return np.where(most_L > 0, device_load_LV.mean(axis=1) / np.where(most_L > 0, most_L, 1), 1.0)


def problem(n_experts: int, replicas: int, groups: int, nodes: int, devices: int) -> str | None:
    """What is wrong with the numbers, which field first; None where they fit."""
    if devices % nodes:
        return f"nodes {nodes} does not divide devices {devices}"
    if replicas % devices:
        return f"replicas {replicas} is not a multiple of devices {devices}: every device holds equally many"
    if replicas < n_experts:
        return f"replicas {replicas} < {n_experts} experts: each must have a place"
    if n_experts % groups:
        return f"groups {groups} does not divide the {n_experts} experts"
    return None


def plain(layers: int, n_experts: int, devices: int) -> Placement:
    """Equal, consecutive parts of the experts on each device, once each: what training does. Raises ValueError where they do not divide."""
    if n_experts % devices:
        raise ValueError(f"devices {devices} does not divide the {n_experts} experts")
    return Placement(np.tile(np.arange(n_experts, dtype=np.int64), (layers, 1)), n_experts, devices, "plain")


def place(load_LE: NDArray[Any], replicas: int, groups: int, nodes: int, devices: int) -> Placement:
    """A placement for experts with `load_LE` (tokens, or any unit) in `replicas` slots. Raises ValueError as `problem` says."""
    n_experts = load_LE.shape[1]
    if wrong := problem(n_experts, replicas, groups, nodes, devices):
        raise ValueError(wrong)
    hierarchical = nodes > 1 and groups % nodes == 0  # on one node both are the same
    if not hierarchical:
        groups = nodes = 1
    layers = [_place_layer([float(load) for load in load_E], replicas, groups, nodes, devices) for load_E in load_LE]
    return Placement(np.array(layers, np.int64), n_experts, devices, "hierarchical" if hierarchical else "global")


def _place_layer(load_E: Sequence[float], replicas: int, groups: int, nodes: int, devices: int) -> list[int]:
    """The expert in each slot."""
    size = len(load_E) // groups
    slots: list[int] = []
    for members in _pack([sum(load_E[group * size : (group + 1) * size]) for group in range(groups)], nodes):
        experts = [group * size + i for group in members for i in range(size)]
        held, share = _replicate([load_E[expert] for expert in experts], replicas // nodes)
        slots += [experts[held[copy]] for device in _pack(share, devices // nodes) for copy in device]
    return slots


def _replicate(loads: Sequence[float], slots: int) -> tuple[list[int], list[float]]:
    """Which item each slot holds, the items themselves first, and the slots' loads: each further slot goes to the item with most load a copy."""
    copies = [1] * len(loads)
    held = list(range(len(loads)))
    waiting = [(-load, item) for item, load in enumerate(loads)]
    heapq.heapify(waiting)
    while len(held) < slots:
        item = waiting[0][1]
        copies[item] += 1
        held.append(item)
        heapq.heapreplace(waiting, (-loads[item] / copies[item], item))
    return held, [loads[item] / copies[item] for item in held]


def _pack(loads: Sequence[float], packs: int) -> list[list[int]]:
    """Equally many items in each pack: the heaviest first, each into the lightest pack with room."""
    room = len(loads) // packs
    packed: list[list[int]] = [[] for _ in range(packs)]
    lightest = [(0.0, pack) for pack in range(packs)]
    for item in sorted(range(len(loads)), key=lambda item: -loads[item]):
        load, pack = heapq.heappop(lightest)
        packed[pack].append(item)
        if len(packed[pack]) < room:
            heapq.heappush(lightest, (load + loads[item], pack))
    return packed
