"""The run's log: the output of all attempts, one after the other, as bytes that are never changed."""

from __future__ import annotations

from django.db import transaction
from django.db.models import F

from experiments.models import Node, Run
from experiments.models.telemetry import LogChunk, SpoolCursor
from experiments.telemetry.rows import query
from experiments.telemetry.write import OutOfOrderError

LIMIT_BYTES = 256 * 1024 * 1024
_FULL = b"\n[the log is longer than 256 MiB; the rest stays on the worker's host]\n"


def append(run_id: int, attempt: int, offset: int, data: bytes, *, node: int = 0) -> tuple[int, int, bytes]:
    """Stores what of `data`, which lies at `offset` of the attempt's log on that host, is new.

    Returns the attempt's offset up to which its log is now known, and place and bytes in the run's log of what was added.
    Raises OutOfOrderError for a gap. Written even when the run is over: the last lines say why.
    """
    with transaction.atomic():
        run = Run.objects.select_for_update(no_key=True).only("log_size").get(pk=run_id)
        cursor = _cursor(run_id, attempt, node)
        if offset > cursor.log_offset:
            raise OutOfOrderError(f"log bytes from {offset} came before byte {cursor.log_offset}")
        fresh = data[cursor.log_offset - offset :]
        start, room = run.log_size, LIMIT_BYTES - run.log_size
        kept = fresh if len(fresh) <= room else fresh[: max(room, 0)] + (_FULL if room > 0 else b"")
        if kept:
            LogChunk.objects.create(run_id=run_id, start=start, attempt=attempt, data=kept)
            Run.objects.filter(pk=run_id).update(log_size=F("log_size") + len(kept))
        cursor.log_offset += len(fresh)
        cursor.save(update_fields=["log_offset"])
        return cursor.log_offset, start, kept


def _cursor(run_id: int, attempt: int, node: int) -> SpoolCursor | Node:
    """The row that knows how much of that host's log has come."""
    if node:
        return Node.objects.select_for_update().get(run=run_id, attempt=attempt, rank=node)
    cursor, _ = SpoolCursor.objects.get_or_create(run_id=run_id, attempt=attempt)
    return cursor


def read(run_id: int, offset: int, limit: int) -> bytes:
    """At most `limit` bytes of the run's log from byte `offset` on."""
    found = query(
        "SELECT start, data FROM experiments_logchunk WHERE run_id = %s AND start < %s AND start >="
        " COALESCE((SELECT max(start) FROM experiments_logchunk WHERE run_id = %s AND start <= %s), 0) ORDER BY start",
        [run_id, offset + limit, run_id, offset],
    )
    return b"".join(data[max(offset - start, 0) : offset + limit - start] for start, data in found)
