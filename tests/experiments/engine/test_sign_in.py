"""Getting in: passwords are guessed slowly, tickets work once, tokens are nowhere in the clear."""

from __future__ import annotations

import logging
import threading

import pytest
from django.db import connection
from django.test import Client

from experiments import access
from experiments.actions import ticket
from experiments.actions.now import after_now
from experiments.actions.sign_in import TRIES_PER_MINUTE, seconds_to_wait
from experiments.actions.token import issue
from experiments.models import LoginThrottle, SignInTicket, Token
from tests.experiments.engine import people


@pytest.mark.django_db(transaction=True)
def test_of_many_guesses_at_once_ten_a_minute_are_looked_at_for_each_account_known_or_not() -> None:
    people.ada()
    looked_at: dict[str, int] = {"ada": 0, "nobody": 0}
    lock = threading.Lock()

    def guess(name: str) -> None:
        waits = [seconds_to_wait(spelling) for spelling in (name, name.upper(), f" {name} ")]
        with lock:
            looked_at[name] += sum(wait == 0 for wait in waits)
            assert all(0 <= wait <= 60 for wait in waits)
        connection.close()

    # A minute that ends meanwhile would begin a new count: say that it is always the same.
    threads = [threading.Thread(target=guess, args=(name,)) for name in looked_at for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    minutes = LoginThrottle.objects.values("minute").distinct().count()
    assert all(TRIES_PER_MINUTE <= count <= TRIES_PER_MINUTE * minutes for count in looked_at.values()), looked_at


@pytest.mark.django_db
class TestThePage:
    def test_the_right_password_lets_in_and_too_many_wrong_ones_keep_out_even_the_right(self) -> None:
        people.ada()
        client = Client()
        assert client.post("/login", {"username": "ada", "password": people.PASSWORD}).status_code == 302
        people.user("bob")
        statuses = [Client().post("/login", {"username": "bob", "password": "wrong"}).status_code for _ in range(3)]
        assert statuses == [403] * 3
        LoginThrottle.objects.all().delete()
        for _ in range(TRIES_PER_MINUTE):
            seconds_to_wait("bob")
        answer = Client().post("/login", {"username": "bob", "password": people.PASSWORD})
        if LoginThrottle.objects.count() == 1:
            assert answer.status_code == 429 and 0 < int(answer.headers["Retry-After"]) <= 60

    def test_a_ticket_signs_in_once(self) -> None:
        path = ticket.make(people.ada())
        first, second = Client(), Client()
        assert first.get(path).status_code == 302
        assert first.get("/api/v1/me").json()["user"] == "ada"
        assert second.get(path).status_code == 410
        assert second.get("/api/v1/me").status_code == 401


@pytest.mark.django_db
class TestTickets:
    def test_they_end_after_ten_minutes_and_with_their_user(self) -> None:
        ada = people.ada()
        old = ticket.make(ada).rpartition("/")[2]
        SignInTicket.objects.update(expires_at=after_now(-1))
        assert ticket.redeem(old) is None
        fresh = ticket.make(ada).rpartition("/")[2]
        ada.is_active = False
        ada.save()
        assert ticket.redeem(fresh) is None
        assert ticket.redeem("nonsense") is None

    def test_what_is_stored_opens_nothing(self) -> None:
        clear = ticket.make(people.ada()).rpartition("/")[2]
        row = SignInTicket.objects.get()
        assert clear not in str(vars(row)) and ticket.redeem(row.sha256) is None


@pytest.mark.django_db(transaction=True)
def test_of_two_who_use_a_ticket_at_once_one_gets_in() -> None:
    clear = ticket.make(people.ada()).rpartition("/")[2]
    barrier, got = threading.Barrier(6), []

    def use() -> None:
        barrier.wait()
        got.append(ticket.redeem(clear))
        connection.close()

    threads = [threading.Thread(target=use) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(user is not None for user in got) == 1


@pytest.mark.django_db
class TestTokens:
    def test_shown_once_stored_never_and_logged_nowhere(self, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        client = Client()
        client.force_login(people.ada())
        made = client.post("/api/v1/tokens", {"name": "n", "scopes": ["read"]}, "application/json").json()
        secret = made["secret"]
        assert secret.startswith("mlk_") and len(secret) >= 47 and made["prefix"] == secret[:8]
        assert "secret" not in client.get("/api/v1/tokens").json()["items"][0]
        Client().get("/api/v1/me", headers={"Authorization": f"Bearer {secret}"})
        Client().get("/api/v1/nowhere", headers={"Authorization": f"Bearer {secret}"})
        assert secret not in str(list(Token.objects.values())) and secret not in caplog.text

    def test_its_use_is_noted_and_its_end_respected(self) -> None:
        issued = issue(user=people.ada(), name="n", scopes=["write"])
        principal = access.authenticate_token(issued.secret)
        assert principal and principal.scopes == {"read", "write"}
        assert Token.objects.get().last_used_at is not None
        Token.objects.update(expires_at=after_now(-1))
        assert access.authenticate_token(issued.secret) is None

    def test_one_that_would_end_in_the_past_is_refused(self) -> None:
        client = Client()
        client.force_login(people.ada())
        for moment, status in (("2001-01-01T00:00:00Z", 422), ("yesterday", 422), ("2101-01-01T00:00:00Z", 201), ("0001-01-01T00:00:00+14:00", 422)):
            body = {"name": "n", "scopes": ["read"], "expires_at": moment}
            assert client.post("/api/v1/tokens", body, "application/json").status_code == status, moment

    @pytest.mark.parametrize(
        "headers",
        [[(b"authorization", b"Bearer mlk_x")], [(b"authorization", b"Basic x")], [(b"cookie", b"sessionid=abc; x")], [(b"cookie", b"\xff;=;;")], []],
    )
    def test_a_socket_of_a_stranger_has_no_principal(self, headers: list[tuple[bytes, bytes]]) -> None:
        assert access.of_websocket({"headers": headers}) is None

    def test_a_socket_knows_a_token_and_a_session(self) -> None:
        ada = people.ada()
        secret = issue(user=ada, name="n", scopes=["read"]).secret
        by_token = access.of_websocket({"headers": [(b"Authorization", f"Bearer {secret}".encode())]})
        assert by_token and by_token.user == ada and by_token.scopes == {"read"}
        client = Client()
        client.force_login(ada)
        by_cookie = access.of_websocket({"headers": [(b"cookie", f"a=b; sessionid={client.cookies['sessionid'].value}".encode())]})
        assert by_cookie and by_cookie.user == ada
