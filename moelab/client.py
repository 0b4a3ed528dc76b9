"""The Python client: everything that a page can do.

    from moelab import Client

    lab = Client()                                   # MOELAB_SERVER and MOELAB_TOKEN, or what `moelab up` left
    run = lab.submit(preset="nano", overrides={"model.moe.top_k": 4}, name="top four")
    run = lab.wait(run["id"])
    steps = lab.steps(run["id"], tensors=["expert_tokens"])
    steps.arrays["expert_tokens"].sum(axis=0)        # tokens of each layer and expert

Runs and other resources are the plain dictionaries of docs/protocol.md, section 8; arrays are numpy's. Every method raises
`ApiError` when the server refuses and `ServerUnreachable` when nobody answers.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from moelab import patience
from moelab.calls import Json, Steps, as_json, given
from moelab.generation_calls import GenerationCalls
from moelab.http import ApiError, ServerUnreachable
from moelab.patience import TERMINAL
from moelab.worker_calls import WorkerCalls

__all__ = ["TERMINAL", "ApiError", "Client", "ServerUnreachable", "Steps"]


class Client(GenerationCalls, WorkerCalls):
    """A connection to a moelab server. Usable as a context manager; not shared between threads."""

    # ----- describe and submit

    def validate(self, spec: Mapping[str, Any] | None = None, *, preset: str | None = None, overrides: Mapping[str, Any] | None = None) -> Json:
        """{spec, price} of a spec or preset with overrides by dotted path; an ApiError of status 422 names the fields at fault."""
        return self._post("/runs/validate", _described(spec, preset, overrides))

    def price(self, spec: Mapping[str, Any] | None = None, *, preset: str | None = None, overrides: Mapping[str, Any] | None = None) -> Json:
        """Parameters, FLOPs and bytes of a spec, which need not be trainable here."""
        return self._post("/price", _described(spec, preset, overrides))

    def import_config(self, config: Mapping[str, Any]) -> Json:
        """{family, spec, price, problems, notes} of a published model's config.json; an ApiError of status 422 names the fields at fault."""
        return self._post("/import-config", dict(config))

    def dense_baseline(
        self,
        spec: Mapping[str, Any] | None = None,
        *,
        preset: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        equal: Literal["flops", "params"] = "flops",
    ) -> Json:
        """{spec, price, compared_with}: the dense spec of equal forward FLOPs or active parameters, its price, and that of what was given."""
        return self._post("/specs/dense-baseline", _described(spec, preset, overrides) | {"equal": equal})

    def submit(
        self,
        spec: Mapping[str, Any] | None = None,
        *,
        preset: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        name: str | None = None,
        project: str | None = None,
        tags: Sequence[str] = (),
        notes: str | None = None,
        priority: int | None = None,
        resume_from: Mapping[str, Any] | None = None,
        idempotency_key: str | None = None,
    ) -> Json:
        """Queues a run and returns it. A lost answer is safe: the same key never makes a second run."""
        body = _described(spec, preset, overrides) | given(
            name=name, project=project, tags=list(tags) or None, notes=notes, priority=priority, resume_from=resume_from
        )
        return self._post("/runs", body, key=idempotency_key or uuid.uuid4().hex)

    def presets(self) -> list[Json]:
        return self._items("/presets")

    def preset(self, name: str) -> Json:
        return self._get(f"/presets/{name}")

    # ----- look

    def run(self, run_id: int, *, wait: Literal["terminal", "change"] | None = None, timeout_s: float = 60.0) -> Json:
        """The run with its spec; with `wait`, as soon as it has changed or ended, or after `timeout_s` seconds."""
        if wait is None:
            return self._get(f"/runs/{run_id}")
        return self._get(f"/runs/{run_id}", params={"wait": wait, "timeout": int(timeout_s)}, timeout_s=timeout_s + 15)

    def runs(self, *, limit: int | None = None, **filters: Any) -> Iterator[Json]:
        """Runs, newest first, over all pages, at most `limit`. Filters as in REST: state, tag, q, metric, project, archived, starred, order."""
        filters = {name: str(value).lower() if isinstance(value, bool) else value for name, value in filters.items() if value is not None}
        return self._pages("/runs", filters, limit)

    def wait(self, run_id: int, *, timeout_s: float | None = None, patience_s: float | None = None) -> Json:
        """The run once it has ended. Bears a server that is away for up to `patience_s` at a time. Raises TimeoutError after `timeout_s`."""
        return patience.wait(self, run_id, timeout_s, patience_s)

    def events(self, run_id: int, *, kind: str | None = None) -> Iterator[Json]:
        """What the run has said, in order: starts, evaluations, spikes, checkpoints, ends."""
        return self._pages(f"/runs/{run_id}/events", given(kind=kind))

    def transitions(self, run_id: int) -> list[Json]:
        return self._items(f"/runs/{run_id}/transitions")

    def nodes(self, run_id: int) -> list[Json]:
        """The hosts of each attempt of a run that is on several, the newest attempt first."""
        return self._items(f"/runs/{run_id}/nodes")

    def checkpoints(self, run_id: int) -> list[Json]:
        return self._items(f"/runs/{run_id}/checkpoints")

    def diff(self, run_id: int, against: int | None = None) -> Json:
        return self._get(f"/runs/{run_id}/diff", params=given(against=against))

    def logs(self, run_id: int, offset: int = 0, limit: int | None = None) -> str:
        """The log from byte `offset` on, at most `limit` bytes, else all there is."""
        parts: list[bytes] = []
        while True:
            response = self.http.request("GET", f"/runs/{run_id}/logs", params=given(offset=offset, limit=limit))
            parts.append(response.content)
            following = int(response.headers.get("X-Next-Offset", offset + len(response.content)))
            if limit is not None or following <= offset or not response.content:
                return b"".join(parts).decode(errors="replace")
            offset = following

    def follow_logs(self, run_id: int, offset: int = 0, *, patience_s: float | None = None) -> Iterator[str]:
        """Pieces of the log as they come, until the run has ended and all was read; goes on where it was after a lost connection."""
        return patience.follow_logs(self, run_id, offset, patience_s)

    def metrics(self, run_id: int, name: str | None = None, **options: Any) -> Json:
        """The names with their last, least and greatest values; or one series with `from_`, `to`, `points`, `exact=True`."""
        if name is None:
            return self._get(f"/runs/{run_id}/metrics")
        options = {key.rstrip("_"): 1 if value is True else value for key, value in options.items() if value is not None and value is not False}
        return self._get(f"/runs/{run_id}/metrics/{name}", params=options)

    def steps(
        self,
        run_id: int,
        *,
        from_step: int | None = None,
        to_step: int | None = None,
        points: int | None = None,
        scalars: Iterable[str] | str = "*",
        tensors: Iterable[str] = (),
        layer: int | None = None,
    ) -> Steps:
        """Scalars and tensors of a range of steps, at most `points` rows (2,000); wider ranges come rolled up."""
        names = scalars if isinstance(scalars, str) else ",".join(scalars)
        query = given(points=points, scalars=names, tensors=",".join(tensors) or None, layer=layer) | given(**{"from": from_step, "to": to_step})
        return self._block(f"/runs/{run_id}/steps", query)

    def routing(
        self,
        run_id: int,
        *,
        step: int | None = None,
        layer: int | None = None,
        from_step: int | None = None,
        to_step: int | None = None,
        points: int | None = None,
    ) -> Steps:
        """Tokens of each expert: all layers at one `step`, or one `layer` over a range of steps."""
        return self._block(f"/runs/{run_id}/routing", given(step=step, layer=layer, points=points) | given(**{"from": from_step, "to": to_step}))

    def specialisation(self, run_id: int, *, step: int | None = None, layer: int = 0) -> Json:
        """Which classes of token and which domains each expert of a layer (row of the tensors) took at a validation, the newest by default."""
        return self._get(f"/runs/{run_id}/specialisation", params=given(step=step, layer=layer))

    def placement(
        self,
        run_id: int,
        *,
        devices: int | None = None,
        replicas: int | None = None,
        nodes: int | None = None,
        groups: int | None = None,
        from_step: int | None = None,
        to_step: int | None = None,
    ) -> Json:
        """Which device would hold which experts if they were placed by the load of these steps (the last 100), and how even that would be."""
        query = given(devices=devices, replicas=replicas, nodes=nodes, groups=groups) | given(**{"from": from_step, "to": to_step})
        return self._get(f"/runs/{run_id}/placement", params=query)

    def export(self, run_id: int, what: str, to: Path | str | None = None) -> Path:
        """Writes `metrics.parquet|csv|jsonl` or `routing.parquet|npz` to `to` (default `run-<id>-<what>` here) and returns the path."""
        path = Path(to) if to is not None else Path(f"run-{run_id}-{what}")
        partial = path.with_name(f".{path.name}.part")
        try:
            with self.http.stream(f"/runs/{run_id}/export/{what}", timeout_s=600) as response, partial.open("wb") as file:
                for chunk in response.iter_bytes():
                    file.write(chunk)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        return path

    # ----- steer

    def cancel(self, run_id: int) -> Json:
        return self._post(f"/runs/{run_id}/cancel")

    def pause(self, run_id: int) -> Json:
        """Asks the run to save a checkpoint and stop until it is resumed."""
        return self._post(f"/runs/{run_id}/pause")

    def resume(self, run_id: int) -> Json:
        return self._post(f"/runs/{run_id}/resume")

    def restart(self, run_id: int) -> Json:
        return self._post(f"/runs/{run_id}/restart", key=uuid.uuid4().hex)

    def checkpoint(self, run_id: int) -> Json:
        """Asks the run to save a checkpoint now and go on."""
        return self._post(f"/runs/{run_id}/checkpoint")

    def clone(self, run_id: int, *, set: Mapping[str, Any] | None = None, name: str | None = None, idempotency_key: str | None = None) -> Json:
        """Queues a run like this one with some fields changed, by dotted path."""
        return self._post(f"/runs/{run_id}/clone", given(set=dict(set or {}) or None, name=name), key=idempotency_key or uuid.uuid4().hex)

    def edit(self, run_id: int, **fields: Any) -> Json:
        """Changes name, notes, tags, starred, archived or priority."""
        return as_json(self.http.request("PATCH", f"/runs/{run_id}", json=fields))

    def delete(self, run_id: int) -> None:
        """Deletes a run that has ended, with everything it recorded."""
        self.http.request("DELETE", f"/runs/{run_id}")

    def bulk(self, action: Literal["cancel", "archive"], ids: Sequence[int]) -> Json:
        return self._post("/runs/bulk", {"action": action, "ids": list(ids)})

    # ----- the rest of the house

    def workers(self) -> list[Json]:
        return self._items("/workers")

    def projects(self) -> list[Json]:
        return self._items("/projects")

    def create_project(self, name: str) -> Json:
        return self._post("/projects", {"name": name})

    def tokens(self) -> list[Json]:
        return self._items("/tokens")

    def create_token(self, name: str, scopes: Sequence[str], **options: Any) -> Json:
        """A new token; its secret is in this answer and never shown again."""
        return self._post("/tokens", {"name": name, "scopes": list(scopes), **options})

    def revoke_token(self, token_id: int) -> None:
        self.http.request("DELETE", f"/tokens/{token_id}")

    def me(self) -> Json:
        return self._get("/me")

    def system(self) -> Json:
        return self._get("/system")

    def schema(self) -> Json:
        """The JSON Schema of a spec."""
        return self._get("/schema/spec")

    # ----- a recorder's call

    def record(self, name: str, *, project: str | None = None, tags: Sequence[str] = (), notes: str | None = None) -> Json:
        """Begins a run that an outside trainer makes and reports itself (`moelab.Recorder`)."""
        return self._post("/runs/record", given(name=name, project=project, tags=list(tags) or None, notes=notes))


def _described(spec: Mapping[str, Any] | None, preset: str | None, overrides: Mapping[str, Any] | None) -> Json:
    if (spec is None) == (preset is None):
        raise ValueError("give either a spec or the name of a preset")
    return given(spec=spec, preset=preset, overrides=dict(overrides or {}) or None)
