"""REST: what runs have said. Steps as binary blocks, metrics as JSON, files to take away, events and the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal, Self

import numpy as np
from django.http import HttpResponse, StreamingHttpResponse
from django.urls import path
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema
from pydantic import Field, model_validator
from rest_framework.request import Request
from rest_framework.response import Response

from experiments import access
from experiments.api import placement, specialisation
from experiments.api.endpoint import Endpoint, Query, items, parameters
from experiments.api.problems import Problem, wrong_parameter
from experiments.live.publish import stream_of
from experiments.live.reader import reader
from experiments.models import TERMINAL
from experiments.models.telemetry import Event
from experiments.telemetry import export, log, read, write
from experiments.telemetry.read import Facts, RangeError
from experiments.threads import Threads
from spec import block
from spec.events import TENSORS

BLOCK_TYPE = "application/vnd.moelab.block"
JSON_CELLS = 500_000
EXACT_STEPS = 100_000
LOG_BYTES = 1_000_000
RECHECK_S = 4.0
KEEP_ALIVE_S = 15.0

Step = Annotated[int, Field(ge=0, lt=2**31)]
threads = Threads("download", 4)


class Range(Query):
    """Steps from … to, both included; points caps the rows of the answer and so chooses the level."""

    from_: Step = Field(0, alias="from", description="First step.")
    to: Step | None = Field(None, description="Last step; the newest where absent.")
    points: int = Field(1000, ge=1, le=read.MAX_POINTS, description="Rows at most.")

    @model_validator(mode="after")
    def _forwards(self) -> Self:
        if self.to is not None and self.from_ > self.to:
            raise ValueError(f"from {self.from_} is after to {self.to}")
        return self


class StepsQuery(Range):
    scalars: str = Field("*", max_length=20_000, description="Names, separated by commas; * for all, empty for none.")
    tensors: str = Field("", max_length=500, description=f"Of {', '.join(TENSORS)}, separated by commas.")
    layer: int | None = Field(None, ge=0, lt=100_000, description="Row of the [layer, …] tensors: only this one is sent.")


class RoutingQuery(Range):
    step: Step | None = Field(None, description="Only this step.")
    layer: int | None = Field(None, ge=0, lt=100_000, description="Row of the tensors: only this MoE layer is sent.")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.step is not None and self.model_fields_set & {"from_", "to", "points"}:
            raise ValueError("step goes without from, to and points")
        return self


class MetricQuery(Range):
    exact: bool = Field(False, description=f"Every value of at most {EXACT_STEPS} steps instead of min, max and mean over buckets.")


class EventsQuery(Query):
    cursor: int = Field(0, ge=0, lt=2**63, description="Id of the last event of the page before.")
    kind: Literal["run_started", "metrics_declared", "eval_done", "spike_detected", "checkpoint_saved", "run_ended"] | None = None
    newest_first: bool = False
    limit: int = Field(100, ge=1, le=500)


class LogQuery(Query):
    offset: int = Field(0, ge=-(2**62), lt=2**62, description="First byte; counted from the end where negative.")
    limit: int = Field(64_000, ge=1, le=LOG_BYTES)


class FollowQuery(Query):
    offset: int = Field(0, ge=-(2**62), lt=2**62, description="First byte; Last-Event-ID wins.")


def _block(facts: Facts, asked: Range, names: list[str] | None, kinds: list[str], layer: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    for parameter, what, asked_for, known in (("scalars", "metric", names or [], facts.names), ("tensors", "tensor", kinds, TENSORS)):
        unknown = [name for name in asked_for if name not in known]
        if unknown:
            raise wrong_parameter(parameter, f"{parameter}: there is no {what} {unknown[0]!r:.250}, only {', '.join(known) or 'none yet':.1000}")
    n_layers = len(facts.moe_layers)
    if layer is not None and layer >= n_layers and "attention_tokens" not in kinds:
        raise wrong_parameter("layer", f"layer: there is no row {layer}, only {n_layers}, counted from 0")
    try:
        return read.steps_arrays(facts, asked.from_, asked.to, asked.points, names, kinds, layer)
    except RangeError as error:
        raise wrong_parameter(error.parameter, str(error)) from error


def _split(names: str) -> list[str]:
    return list(dict.fromkeys(name for name in names.split(",") if name))


class StepsView(Endpoint):
    @extend_schema(operation_id="run_steps", parameters=parameters(StepsQuery), responses={(200, BLOCK_TYPE): OpenApiTypes.BINARY})
    def get(self, request: Request, run_id: int) -> HttpResponse:
        """A `steps` block: scalars and tensors of a range of steps, at the level that its size asks for."""
        asked = self.query(StepsQuery)
        names = None if asked.scalars == "*" else _split(asked.scalars)
        header, arrays = _block(Facts.of(self.run(run_id)), asked, names, _split(asked.tensors), asked.layer)
        return HttpResponse(block.encode(header, arrays), content_type=BLOCK_TYPE)


class RoutingView(Endpoint):
    @extend_schema(
        operation_id="run_routing",
        parameters=parameters(RoutingQuery),
        responses={(200, BLOCK_TYPE): OpenApiTypes.BINARY, (200, "application/json"): OpenApiTypes.OBJECT},
    )
    def get(self, request: Request, run_id: int) -> HttpResponse | Response:
        """Tokens to each expert, and those that capacity dropped: a `steps` block, or JSON where Accept asks for it."""
        asked = self.query(RoutingQuery)
        reach = asked if asked.step is None else Range.model_validate({"from": asked.step, "to": asked.step, "points": 1})
        header, arrays = _block(Facts.of(self.run(run_id)), reach, [], list(export.ROUTING), asked.layer)
        if "application/json" not in request.headers.get("Accept", ""):
            return HttpResponse(block.encode(header, arrays), content_type=BLOCK_TYPE)
        if sum(array.size for array in arrays.values()) > JSON_CELLS:
            detail = f"points: more than {JSON_CELLS} numbers; ask for fewer points, for one layer, or for the binary block"
            raise wrong_parameter("points", detail)
        return Response({**header, **{name: array.tolist() for name, array in arrays.items()}})


def _numbers(array: Any) -> list[float | None]:
    """A column for JSON, which has no NaN."""
    return [value if good else None for value, good in zip(array.tolist(), np.isfinite(array), strict=True)]


class MetricsView(Endpoint):
    @extend_schema(operation_id="run_metrics", responses=OpenApiTypes.OBJECT)
    def get(self, request: Request, run_id: int) -> Response:
        """The run's metrics: name, newest value, minimum, maximum and how many steps have one."""
        self.query(Query)
        run = self.run(run_id)
        facts = Facts.of(run)
        at = read.zoom(facts, 0, None, 200)
        found = read.scalars(facts, at.level, at.low, at.high)
        if not len(found):
            return items([{"name": name, "last": None, "min": None, "max": None, "count": 0} for name in facts.names])
        whole = found.reduce(np.zeros(len(found), np.int64))
        columns = zip(facts.names, _numbers(whole.mins[0]), _numbers(whole.maxs[0]), whole.counts[0].tolist(), strict=True)
        return items([{"name": name, "last": run.summary.get(name), "min": low, "max": high, "count": count} for name, low, high, count in columns])


class MetricView(Endpoint):
    @extend_schema(operation_id="run_metric", parameters=parameters(MetricQuery), responses=OpenApiTypes.OBJECT)
    def get(self, request: Request, run_id: int, name: str) -> Response:
        """One metric over the steps: min, max and mean of each bucket (nothing that sticks out is lost), or every value."""
        asked = self.query(MetricQuery)
        facts = Facts.of(self.run(run_id))
        if name not in facts.names:
            raise Problem("not-found", f"run {run_id} reports no metric {name!r:.250}")
        if asked.exact:
            return Response(self._exact(facts, asked, name))
        header, arrays = _block(facts, asked, [name], [], None)
        answer = {"name": name, **{key: header[key] for key in ("level", "from", "to", "total")}, "sampled": header["level"] > 1}
        parts = ("min", "max", "mean")
        columns = {part: arrays["scalars" if header["level"] == 1 else f"scalars_{part}"][:, 0] for part in parts}
        return Response(answer | {"steps": arrays["step"].tolist()} | {part: _numbers(column) for part, column in columns.items()})

    def _exact(self, facts: Facts, asked: MetricQuery, name: str) -> dict[str, Any]:
        to = facts.last if asked.to is None else min(asked.to, facts.last)
        if to - asked.from_ >= EXACT_STEPS:
            most = asked.from_ + EXACT_STEPS - 1
            raise wrong_parameter("to", f"to: exact gives at most {EXACT_STEPS} steps at once; from {asked.from_} that is to={most}")
        found = read.scalars(facts, 1, asked.from_, to)
        column = _numbers(found.mins[:, facts.names.index(name)])
        answer = {"name": name, "level": 1, "from": asked.from_, "to": to, "total": len(found), "sampled": False}
        return answer | {"steps": found.key.tolist(), "values": column}


class ExportView(Endpoint):
    @extend_schema(operation_id="run_export", responses={(200, "application/octet-stream"): OpenApiTypes.BINARY})
    def get(self, request: Request, run_id: int, file: str) -> StreamingHttpResponse:
        """Every value as a file: metrics.parquet, metrics.csv, metrics.jsonl, routing.parquet, routing.npz or log.txt."""
        self.query(Query)
        run = self.run(run_id)
        if file not in export.FORMATS:
            raise Problem("not-found", f"there is no export {file!r:.100}, only {', '.join(export.FORMATS)}")
        content_type, make = export.FORMATS[file]
        response = StreamingHttpResponse(_pieces(make(Facts.of(run))), content_type=content_type)
        response.headers["Content-Disposition"] = f'attachment; filename="run-{run_id}-{file}"'
        return response


async def _pieces(made: Iterator[bytes]) -> AsyncIterator[bytes]:
    while (piece := await threads.run(next, made, None)) is not None:
        if piece:
            yield piece


class EventsView(Endpoint):
    @extend_schema(operation_id="run_events", parameters=parameters(EventsQuery), responses=OpenApiTypes.OBJECT)
    def get(self, request: Request, run_id: int) -> Response:
        """What the run said besides its steps, in the order of arrival."""
        asked = self.query(EventsQuery)
        found = Event.objects.filter(run_id=self.run(run_id).pk)
        if asked.kind:
            found = found.filter(kind=asked.kind)
        if asked.cursor:
            found = found.filter(id__lt=asked.cursor) if asked.newest_first else found.filter(id__gt=asked.cursor)
        page = list(found.order_by("-id" if asked.newest_first else "id")[: asked.limit + 1])
        more = str(page[asked.limit - 1].pk) if len(page) > asked.limit else None
        return items([write.as_json(event) for event in page[: asked.limit]], more, request)


class LogView(Endpoint):
    @extend_schema(operation_id="run_log", parameters=parameters(LogQuery), responses={(200, "text/plain"): OpenApiTypes.BINARY})
    def get(self, request: Request, run_id: int) -> HttpResponse:
        """A part of the log as bytes; X-Next-Offset says where the next part begins, X-Log-Size where the log ends."""
        asked = self.query(LogQuery)
        run = self.run(run_id)
        offset = _from_start(asked.offset, run.log_size)
        data = log.read(run_id, offset, asked.limit)
        response = HttpResponse(data, content_type="text/plain; charset=utf-8")
        response.headers["X-Next-Offset"] = str(offset + len(data))
        response.headers["X-Log-Size"] = str(run.log_size)
        return response


def _from_start(offset: int, size: int) -> int:
    return max(size + offset, 0) if offset < 0 else offset


class FollowView(Endpoint):
    @extend_schema(operation_id="run_log_follow", parameters=parameters(FollowQuery), responses={(200, "text/event-stream"): OpenApiTypes.STR})
    def get(self, request: Request, run_id: int) -> StreamingHttpResponse:
        """The log as it grows, as server-sent events: data is JSON {offset, text}, id the next byte; an event `end` after the last."""
        asked = self.query(FollowQuery)
        run = self.run(run_id)
        seen = request.headers.get("Last-Event-ID", "")
        given = int(seen) if seen.isascii() and seen.isdigit() and len(seen) < 19 else asked.offset
        follow = _follow(self.principal, run_id, _from_start(given, run.log_size))
        response = StreamingHttpResponse(follow, content_type="text/event-stream")
        response.headers["X-Accel-Buffering"] = "no"
        return response


def _grown(principal: access.Principal, run_id: int, offset: int) -> tuple[bytes, bool] | None:
    """The next part of the log and whether the run is over; None when the principal may no longer see it."""
    run = access.visible_runs(principal).only("state").filter(pk=run_id).first()
    return None if run is None or not access.still_counts(principal) else (log.read(run_id, offset, LOG_BYTES), run.state in TERMINAL)


async def _follow(principal: access.Principal, run_id: int, offset: int) -> AsyncIterator[bytes]:
    clock = asyncio.get_running_loop().time
    spoke = clock()
    async with reader().subscribed(stream_of(run_id)) as news:
        while True:
            found = await threads.run(_grown, principal, run_id, offset)
            if found is None:
                return
            data, over = found
            whole = data if over else _whole_characters(data)
            if whole:
                text = json.dumps({"offset": offset, "text": whole.decode("utf-8", "replace")})
                offset += len(whole)
                spoke = clock()
                yield f"id: {offset}\ndata: {text}\n\n".encode()
                continue
            if over:
                yield f"id: {offset}\nevent: end\ndata: {{}}\n\n".encode()
                return
            if clock() - spoke > KEEP_ALIVE_S:
                spoke = clock()
                yield b": still here\n\n"
            await _until_log(news)


async def _until_log(news: Any) -> None:
    """Until the log has grown, or it is time to look whether the run is over and the right to see it still there."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(RECHECK_S / 2):
            while True:
                await news.news.wait()
                told, news.gap = news.gap, False
                while (heard := news.pop()) is not None:
                    told |= heard.kind in ("log", "run")
                if told:
                    return


def _whole_characters(data: bytes) -> bytes:
    """`data` without the beginning of a character at its end."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return data[:-back] if length > back else data
        if byte < 0x80:
            return data
    return data


urlpatterns = [
    *specialisation.urlpatterns,
    *placement.urlpatterns,
    path("runs/<int:run_id>/steps", StepsView.as_view()),
    path("runs/<int:run_id>/routing", RoutingView.as_view()),
    path("runs/<int:run_id>/metrics", MetricsView.as_view()),
    path("runs/<int:run_id>/metrics/<path:name>", MetricView.as_view()),
    path("runs/<int:run_id>/export/<str:file>", ExportView.as_view()),
    path("runs/<int:run_id>/events", EventsView.as_view()),
    path("runs/<int:run_id>/logs", LogView.as_view()),
    path("runs/<int:run_id>/logs/follow", FollowView.as_view()),
]
