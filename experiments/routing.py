"""The WebSockets. Each decides by itself whom it lets in; `experiments.routes` names what it asks for."""

from typing import Any

from django.urls import path, re_path

from experiments.ingest.consumer import ingest
from experiments.live.viewer import list_viewer, run_viewer


async def nowhere(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Every other address: refused before it opens, which the client sees as 403."""
    await receive()
    await send({"type": "websocket.close", "code": 4404})


# Django's `path` is annotated for views of HTTP; Channels' router takes ASGI applications.
_path: Any = path
_re_path: Any = re_path

websocket_urlpatterns = [
    _path("ws/ingest/<int:run_id>/", ingest),
    _path("ws/runs/", list_viewer),
    _path("ws/runs/<int:run_id>/", run_viewer),
]

websocket_nowhere = _re_path(r"", nowhere)
