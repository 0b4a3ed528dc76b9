"""The hosts of an attempt that has several: their right to speak, their leases, where they meet, and what became of them.

Node 0 speaks for the attempt and judges it (see attempt): what is noted here of another node reaches it as a command, and it ends the
attempt for that reason. A node that has left, or whose attempt is over, is fenced; but one that others ended may still say its last word.
"""

from __future__ import annotations

import hmac
from dataclasses import asdict, dataclass

from django.db.models import F, Q, QuerySet
from django.db.models.functions import Now

from experiments import secret
from experiments.actions.lease import LEASE_S
from experiments.actions.now import after_now
from experiments.live.publish import publish_run
from experiments.models import LIVE, Node, Run

LAST_WORD_S = 60
PEER_LOST = "peer_lost"
"""The reason of a node that only noticed that another was gone: any other node's reason says more."""


@dataclass(frozen=True)
class Hosts:
    """What the hosts of an attempt must know of each other: where the ranks meet ("" until node 0 has said so), and why it cannot go on."""

    rendezvous: str
    lost: tuple[str, str] | None
    """(reason, detail) of the node that has failed first."""
    hanging: bool = False
    """The ranks stand still: each host is to note its own ranks' stacks."""


@dataclass(frozen=True)
class LastWord:
    """How a node's ranks ended; the exit code or the signal is that of the first one that failed."""

    outcome: str
    reason: str = ""
    detail: str = ""
    exit_code: int | None = None
    signal: int | None = None
    log_tail: str = ""


def hosts_of(run_id: int, attempt: int) -> Hosts:
    """As node 0 has told it, and the others."""
    rows = Node.objects.filter(run=run_id, attempt=attempt).order_by("left_at", "rank")
    nodes = list(rows.values_list("rank", "rendezvous", "outcome", "reason", "detail", "hangs"))
    failed = [(reason, detail) for rank, _, outcome, reason, detail, _ in nodes if rank and outcome == "failed"]
    plain = [lost for lost in failed if lost[0] != PEER_LOST]
    all_left = all(outcome for rank, _, outcome, *_ in nodes if rank)
    lost = plain[0] if plain else failed[0] if failed and all_left else None
    return Hosts(next((place for rank, place, *_ in nodes if rank == 0), ""), lost, any(node[-1] for node in nodes))


def may_speak(run_id: int, attempt: int, rank: int, bearer: str) -> bool:
    """Whether `bearer` is the token of that node."""
    known = Node.objects.filter(run=run_id, attempt=attempt, rank=rank, attempt__gt=0).values_list("token_sha256", flat=True).first()
    return known is not None and hmac.compare_digest(known, secret.digest(bearer))


def present(run_id: int, attempt: int, rank: int) -> QuerySet[Node]:
    """The node, if it has not left and its attempt lives."""
    return Node.objects.filter(run=run_id, attempt=attempt, rank=rank, outcome="", run__attempt=F("attempt"), run__state__in=LIVE)


def renew_node(run_id: int, attempt: int, rank: int) -> bool:
    """Extends the node's lease by LEASE_S from now; False where it is fenced."""
    return bool(present(run_id, attempt, rank).update(lease_until=after_now(LEASE_S)))


def announce(run_id: int, attempt: int, rendezvous: str) -> None:
    """Node 0 says where the ranks meet."""
    if present(run_id, attempt, 0).exclude(rendezvous=rendezvous).update(rendezvous=rendezvous):
        publish_run(run_id)


def hang(run_id: int, attempt: int) -> None:
    """Node 0 says that the ranks stand still."""
    if present(run_id, attempt, 0).filter(hangs=False).update(hangs=True):
        publish_run(run_id)


def leave_node(run_id: int, attempt: int, rank: int, word: LastWord) -> bool:
    """The node's ranks have ended; whether that was noted. The first word counts, and for LAST_WORD_S one of a node that others have ended."""
    said = {**asdict(word), "reason": word.reason[:64]}
    noted = present(run_id, attempt, rank).update(**said, left_at=Now()) or ended_by_others(run_id, attempt, rank).update(**said)
    if noted:
        publish_run(run_id)
    return bool(noted)


def ended_by_others(run_id: int, attempt: int, rank: int) -> QuerySet[Node]:
    """The node, if its attempt was ended a short time ago, before it had said how its own ranks did: it has no reason then."""
    over = Node.objects.filter(run=run_id, attempt=attempt, rank=rank, rank__gt=0, reason="").exclude(outcome="")
    return over.filter(left_at__gt=after_now(-LAST_WORD_S))


def close_nodes(run: Run, word: LastWord) -> None:
    """The present attempt of `run`, which the caller has locked, is over, as node 0 has said or as was said for it. Hosts that had no word
    ended as it did or, where it failed, were stopped.
    """
    silent = Node.objects.filter(run=run.pk, attempt=run.attempt, attempt__gt=0, outcome="")
    silent.filter(rank=0).update(**{**asdict(word), "reason": word.reason[:64]}, left_at=Now())
    silent.update(outcome="stopped" if word.outcome == "failed" else word.outcome, left_at=Now())


def never_taken(run: Run) -> bool:
    """Whether a host let its time pass without taking its part in the present attempt: the ranks never met, and nothing was trained."""
    untaken = Node.objects.filter(run=run.pk, attempt=run.attempt, attempt__gt=0, token_sha256="")
    return untaken.filter(Q(rank=0) | Q(lease_until__lt=Now())).exists()


def lose_silent_nodes() -> list[int]:
    """Gives up the nodes that were not heard from for their whole lease; returns their runs."""
    live = Node.objects.filter(attempt=F("run__attempt"), run__state__in=LIVE)
    silent = live.select_for_update(skip_locked=True, of=("self",)).filter(attempt__gt=0, rank__gt=0, outcome="", lease_until__lt=Now())
    lost = list(silent.select_related("worker").order_by("pk")[:1000])
    for node in lost:
        was = "was not heard from for its whole lease" if node.token_sha256 else "did not take its part in time"
        leave_node(node.run_id, node.attempt, node.rank, LastWord("failed", "worker_lost", f"node {node.rank} on {node.worker.name} {was}"))
    return [node.run_id for node in lost]
