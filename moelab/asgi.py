"""The web process: `uvicorn moelab.asgi:application`. HTTP and WebSockets, and the reconciler in a thread of its own."""

from __future__ import annotations

import os
import threading
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "moelab.settings")

from django.core.asgi import get_asgi_application

django_application = get_asgi_application()

from channels.routing import ProtocolTypeRouter, URLRouter

from experiments import reconcile
from experiments.routing import websocket_nowhere, websocket_urlpatterns
from moelab.body_limit import BodyLimit


async def lifespan(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """Starts the reconciler with the web process, and stops it before the process ends."""
    stop = threading.Event()
    thread = threading.Thread(target=reconcile.run_forever, args=(stop,), name="reconciler", daemon=True)
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            thread.start()
            await send({"type": "lifespan.startup.complete"})
        elif message["type"] == "lifespan.shutdown":
            stop.set()
            await send({"type": "lifespan.shutdown.complete"})
            return


websockets = URLRouter([*websocket_urlpatterns, websocket_nowhere])
application = ProtocolTypeRouter({"http": BodyLimit(django_application), "websocket": websockets, "lifespan": lifespan})
