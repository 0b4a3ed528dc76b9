"""The Celery app of a worker host. Its one task starts what it finds and returns in seconds: training never runs inside Celery.

moelab worker          (or: celery -A workers.app worker -Q work)
moelab beat            rings the bell every 10 s, so that a bell that was lost does no harm
"""

from __future__ import annotations

import logging

from celery import Celery

from moelab import environment
from moelab.client import ApiError, ServerUnreachable
from moelab.home import home
from moelab.redis_url import celery_broker
from workers import canary
from workers.launch import LaunchError
from workers.look_for_work import look_for_work, worker_name
from workers.storage import check_storage
from workers.tenant import sole_worker

QUEUE = "work"
BELL = "workers.look_for_work"
RING_EVERY_S = 10

logger = logging.getLogger(__name__)

BROKER = celery_broker(environment.text("REDIS_URL", "redis://127.0.0.1:6379/0"))
# Without its fixups Celery leaves Django alone, even where DJANGO_SETTINGS_MODULE is set.
app = Celery("moelab", broker=BROKER, set_as_current=False, fixups=[])
app.conf.update(
    # What a worker accepts: JSON, acknowledged before it starts, one at a time. A message that is lost or comes twice changes nothing.
    accept_content=["json"],
    task_serializer="json",
    result_backend=None,
    task_ignore_result=True,
    task_acks_late=False,
    worker_prefetch_multiplier=1,
    worker_concurrency=1,
    task_default_queue=QUEUE,
    task_time_limit=30,
    task_soft_time_limit=25,
    worker_hijack_root_logger=False,
    worker_send_task_events=False,
    worker_cancel_long_running_tasks_on_connection_loss=False,
    broker_connection_retry_on_startup=True,
    broker_connection_max_retries=None,
    broker_transport_options={
        "socket_timeout": 5,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "retry_on_timeout": True,
        "health_check_interval": 10,
        "visibility_timeout": 3600,
    },
    beat_schedule={"bell": {"task": BELL, "schedule": RING_EVERY_S, "options": {"queue": QUEUE, "expires": RING_EVERY_S}}},
    beat_schedule_filename=str(home() / "beat"),
    beat_max_loop_interval=RING_EVERY_S,
)


@app.task(name=BELL)
def answer_bell() -> None:
    """A server that is away is worth one line: the next bell comes within 10 s."""
    try:
        look_for_work()
    except (ApiError, ServerUnreachable, LaunchError) as error:
        logger.warning("no work taken: %s", error)


def start_worker() -> None:
    """Consumes until it is stopped, or until it finds itself deaf (workers.canary). Raises HomeInUseError, and ValueError for MOELAB_CHECKPOINTS."""
    check_storage()
    canary.install(app)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    name = f"{worker_name()}@%h"
    with sole_worker(home()):
        app.worker_main(["worker", "-Q", QUEUE, "-n", name, "--loglevel", "INFO", "--without-gossip", "--without-mingle", "--without-heartbeat"])


def start_beat() -> None:
    """Rings the bell every RING_EVERY_S seconds until it is stopped."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    home().mkdir(parents=True, exist_ok=True)
    app.Beat(loglevel="INFO", schedule=app.conf.beat_schedule_filename).run()
