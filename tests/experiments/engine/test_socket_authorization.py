"""The walk through the WebSockets: every one × everybody, by token, by cookie from our own page, and by cookie from elsewhere."""

from __future__ import annotations

import pytest
from asgiref.sync import async_to_sync
from asgiref.testing import ApplicationCommunicator
from channels.routing import URLRouter
from django.test import Client

from experiments.actions.record import record
from experiments.actions.token import issue
from experiments.models import Project, Role, Run
from experiments.routes import WEBSOCKETS
from experiments.routing import websocket_urlpatterns
from moelab.asgi import application
from moelab.embedded import Valkey
from tests.experiments.engine import people

Headers = list[tuple[bytes, bytes]]
HOST = (b"host", b"testserver")
OWN, FOREIGN = (b"origin", b"http://testserver"), (b"origin", b"http://evil.example")

VIEWERS = {"viewer", "editor", "admin", "root", "viewer's cookie", "read token"}
LET_IN = {
    "ws/runs/<int:run_id>/": VIEWERS,
    "ws/runs/": VIEWERS | {"outsider"},
    "ws/ingest/<int:run_id>/": {"editor's ingest token"},
}


async def opens(path: str, headers: Headers) -> bool:
    """Whether the socket is accepted, and not closed before it has said anything."""
    where, _, query = path.partition("?")
    scope = {"type": "websocket", "path": where, "query_string": query.encode(), "headers": [HOST, *headers], "subprotocols": []}
    socket = ApplicationCommunicator(URLRouter(websocket_urlpatterns), scope)
    await socket.send_input({"type": "websocket.connect"})
    answer = await socket.receive_output(timeout=10)
    if answer["type"] == "websocket.accept":
        answer = await socket.receive_output(timeout=10)
    await socket.send_input({"type": "websocket.disconnect", "code": 1000})
    await socket.wait(timeout=10)
    return answer["type"] in ("websocket.accept", "websocket.send")


@pytest.fixture
def everybody(transactional_db: None) -> dict[str, Headers]:
    project = Project.objects.create(name="theirs")
    users = {role: people.user(role, project, role) for role in Role.values}
    users |= {"outsider": people.user("outsider", Project.default(), Role.ADMIN), "root": people.user("root", is_superuser=True)}

    def bearer(name: str, *scopes: str) -> Headers:
        return [(b"authorization", f"Bearer {issue(user=users[name], name='t', scopes=scopes).secret}".encode())]

    client = Client()
    client.force_login(users["viewer"])
    cookie = (b"cookie", f"sessionid={client.cookies['sessionid'].value}".encode())
    return {
        "anonymous": [OWN],
        **{name: bearer(name, "admin") for name in users},
        "read token": bearer("viewer", "read"),
        "worker token": bearer("admin", "worker"),
        "viewer's ingest token": bearer("viewer", "ingest"),
        "editor's ingest token": bearer("editor", "ingest"),
        "outsider's ingest token": bearer("outsider", "ingest"),
        "not a token": [(b"authorization", b"Bearer mlk_x")],
        "viewer's cookie": [OWN, cookie],
        "viewer's cookie from elsewhere": [FOREIGN, cookie],
        "viewer's cookie from nowhere": [cookie],
        "viewer's cookie behind a bad token": [OWN, cookie, (b"authorization", b"Bearer mlk_x")],
    }


@pytest.mark.parametrize("path", ["/ws/", "/ws/nothing/", "/ws/runs/99999999999999999999999999/x", "/"])
async def test_no_other_address_opens(path: str) -> None:
    socket = ApplicationCommunicator(application, {"type": "websocket", "path": path, "raw_path": path.encode(), "headers": [], "query_string": b""})
    await socket.send_input({"type": "websocket.connect"})
    assert await socket.receive_output(2) == {"type": "websocket.close", "code": 4404}


@pytest.mark.parametrize("route", sorted(WEBSOCKETS))
def test_each_lets_in_whom_it_should(everybody: dict[str, Headers], valkey: Valkey, route: str) -> None:
    run: Run = record(user=people.user("editor"), project=Project.objects.get(name="theirs"), name="r")
    path = "/" + route.replace("<int:run_id>", str(run.pk)) + ("?attempt=0" if "ingest" in route else "")

    async def knock() -> set[str]:
        return {who for who, headers in everybody.items() if await opens(path, headers)}

    found, wanted = async_to_sync(knock)(), LET_IN[route]
    assert found == wanted, f"let in: {sorted(found - wanted)}; kept out: {sorted(wanted - found)}"
