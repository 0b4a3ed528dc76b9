"""REST: where a run's experts would lie if they were placed by the load that was measured."""

from __future__ import annotations

from django.urls import path
from drf_spectacular.utils import extend_schema
from pydantic import BaseModel, Field
from rest_framework.request import Request
from rest_framework.response import Response

from experiments.api.endpoint import Endpoint, Query, parameters
from experiments.api.problems import Problem, wrong_parameter
from experiments.models import Run
from experiments.telemetry import placement
from experiments.telemetry.placement import Placed, PlacementError


class PlacementQuery(Query):
    devices: int | None = Field(None, ge=1, le=4096, description="Devices that share the experts; the run's own ranks where absent.")
    replicas: int | None = Field(
        None, ge=1, le=65_536, description="Places for experts over all devices: a multiple of devices; as few as fit where absent."
    )
    nodes: int = Field(1, ge=1, le=4096, description="Hosts of the devices, equally many on each.")
    groups: int | None = Field(None, ge=1, le=65_536, description="Groups of experts that routing is limited to; the router's where absent.")
    from_: int | None = Field(None, alias="from", ge=0, lt=2**31, description=f"First step; the last {placement.WINDOW_STEPS} steps where absent.")
    to: int | None = Field(None, ge=0, lt=2**31, description="Last step; the newest where absent.")


def made_for(run: Run, query: PlacementQuery) -> Placed | None:
    """The placement that is asked for; None where there is no load. Raises Problem (400) with the parameter at fault."""
    try:
        measured = placement.loads(run, query.from_, query.to)
        if measured is None:
            return None
        n_experts = measured.tokens.shape[1]
        return placement.placed(measured, placement.asked(run, n_experts, query.devices, query.replicas, query.nodes, query.groups))
    except PlacementError as error:
        raise wrong_parameter(error.parameter, str(error)) from error


class LayerPlacement(BaseModel):
    """One layer: the experts on each device, the copies of each expert, device loads in tokens, and balancedness (mean / largest)."""

    layer: int
    device_experts: list[list[int]]
    copies: list[int]
    load_before: list[float] | None
    load_after: list[float]
    balance_before: float | None
    balance_after: float


class PlacementOf(BaseModel):
    """The placement; `balance_*` are means over the layers. Before: equal, consecutive parts, null where devices do not divide the experts."""

    from_: int = Field(serialization_alias="from")
    to: int
    steps: int
    devices: int
    replicas: int
    nodes: int
    groups: int
    policy: str
    balance_before: float | None
    balance_after: float
    layers: list[LayerPlacement]


class PlacementView(Endpoint):
    @extend_schema(operation_id="run_placement", parameters=parameters(PlacementQuery), responses=PlacementOf)
    def get(self, request: Request, run_id: int) -> Response:
        """Which device would hold which experts, hot ones several times, for the loads that the run measured over a window of steps."""
        run = self.run(run_id)
        made = made_for(run, self.query(PlacementQuery))
        if made is None:
            raise Problem("not-found", f"run {run_id} has no expert loads in these steps")
        return Response(shown(made, run.moe_layers).model_dump(by_alias=True))


def shown(made: Placed, moe_layers: list[int]) -> PlacementOf:
    """The answer; layers by their index in the model."""
    before, after = made.balance
    names = [*moe_layers, *range(len(moe_layers), len(after))]
    copies = made.placement.copies_LE
    layers = [
        LayerPlacement(
            layer=names[row],
            device_experts=[made.placement.on_device(row, device) for device in range(made.asked.devices)],
            copies=copies[row].tolist(),
            load_before=None if made.load_before is None else made.load_before[row].tolist(),
            load_after=made.load_after[row].tolist(),
            balance_before=None if before is None else float(before[row]),
            balance_after=float(after[row]),
        )
        for row in range(len(after))
    ]
    return PlacementOf(
        from_=made.loads.first,
        to=made.loads.last,
        steps=made.loads.steps,
        devices=made.asked.devices,
        replicas=made.asked.replicas,
        nodes=made.asked.nodes,
        groups=made.asked.groups,
        policy=made.placement.policy,
        balance_before=None if before is None else float(before.mean()),
        balance_after=float(after.mean()),
        layers=layers,
    )


urlpatterns = [path("runs/<int:run_id>/placement", PlacementView.as_view())]
