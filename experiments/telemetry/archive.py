"""What a dead attempt wrote past the checkpoint that its successor goes on from is set aside, not lost."""

from __future__ import annotations

from django.db import connection

from experiments.models import Run
from experiments.telemetry import rollup, rows

_SCALARS = """
INSERT INTO experiments_archivedscalar (run_id, attempt, step, at, vals)
SELECT run_id, attempt, step, at, vals FROM experiments_stepscalar WHERE run_id = %s AND step > %s AND attempt < %s
ON CONFLICT DO NOTHING
"""
_TENSORS = """
INSERT INTO experiments_archivedtensor (run_id, attempt, kind, step, shape, payload)
SELECT t.run_id, s.attempt, t.kind, t.step, t.shape, t.payload
FROM experiments_steptensor t JOIN experiments_stepscalar s USING (run_id, step)
WHERE s.run_id = %s AND s.step > %s AND s.attempt < %s
ON CONFLICT DO NOTHING
"""
_FORGET_TENSORS = """
DELETE FROM experiments_steptensor t USING experiments_stepscalar s
WHERE t.run_id = s.run_id AND t.step = s.step AND s.run_id = %s AND s.step > %s AND s.attempt < %s
"""
_FORGET_SCALARS = "DELETE FROM experiments_stepscalar WHERE run_id = %s AND step > %s AND attempt < %s"


def archive_after(run_id: int, step: int, older_than_attempt: int) -> int | None:
    """Moves the rows with a higher step than `step` of attempts before `older_than_attempt` to the archive.

    Returns the run's last step then, or None where there was nothing to move. The transaction must hold the run's row.
    """
    with connection.cursor() as cursor:
        for statement in (_SCALARS, _TENSORS, _FORGET_TENSORS, _FORGET_SCALARS):
            cursor.execute(statement, [run_id, step, older_than_attempt])
            if statement is _SCALARS and not cursor.rowcount:
                return None
    last = last_step(run_id)
    width = len(Run.objects.values_list("metric_names", flat=True).get(pk=run_id))
    rollup.rebuild(run_id, width, max(step, 0), last)
    Run.objects.filter(pk=run_id).update(last_step=last)
    return last


def last_step(run_id: int) -> int:
    """The highest step in the store, 0 where there is none."""
    found = rows.query("SELECT step FROM experiments_stepscalar WHERE run_id = %s ORDER BY step DESC LIMIT 1", [run_id])
    return int(found[0][0]) if found else 0
