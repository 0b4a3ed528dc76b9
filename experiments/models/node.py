"""A worker's part in a run on several hosts."""

from __future__ import annotations

from django.contrib.postgres.fields import ArrayField
from django.db import models

from experiments.models.run import Run
from experiments.models.worker import Worker


class Node(models.Model):
    """A place kept while a run gathers its hosts (attempt 0), then node `rank` of an attempt. Both hold the worker's `devices`.

    `lease_until` ends the place, or is the node's lease; node 0's is the run's own. `token_sha256` is empty until the worker has taken its
    part. `rendezvous`, node 0's, is where the ranks meet; `hangs`, node 0's too, that they stand still. `outcome`, with reason, detail and the
    time, is set once the node has left the attempt: succeeded, failed, cancelled, paused, or stopped because the attempt had failed elsewhere; then
    it has no reason. `log_tail` is how its log ends: after a hang with the stacks of its ranks.
    """

    run = models.ForeignKey(Run, models.CASCADE, related_name="nodes")
    worker = models.ForeignKey(Worker, models.CASCADE, related_name="nodes")
    devices = ArrayField(models.CharField(max_length=64), default=list)
    attempt = models.IntegerField(default=0)
    rank = models.IntegerField(default=0)
    lease_until = models.DateTimeField()
    token_sha256 = models.CharField(max_length=64, default="", blank=True)
    rendezvous = models.CharField(max_length=100, default="", blank=True)
    hangs = models.BooleanField(default=False)
    log_offset = models.BigIntegerField(default=0)
    outcome = models.CharField(max_length=16, default="", blank=True)
    reason = models.CharField(max_length=64, default="", blank=True)
    detail = models.TextField(default="", blank=True)
    left_at = models.DateTimeField(null=True)
    exit_code = models.IntegerField(null=True)
    signal = models.IntegerField(null=True)
    log_tail = models.TextField(default="", blank=True)

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["run", "attempt", "worker"], name="one_node_per_worker"),
            models.UniqueConstraint(fields=["run", "attempt", "rank"], condition=models.Q(attempt__gt=0), name="one_node_per_rank"),
        ]
        indexes = [models.Index(fields=["lease_until"], name="node_leases", condition=models.Q(outcome=""))]

    def __str__(self) -> str:
        return f"node {self.rank} of run {self.run_id}, attempt {self.attempt}"

    @property
    def ranks(self) -> list[int]:
        """The run's ranks on this host: one for each device, after those of the hosts before it."""
        return list(range(self.rank * len(self.devices), (self.rank + 1) * len(self.devices)))
