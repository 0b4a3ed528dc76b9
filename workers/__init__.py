"""The GPU host: a Celery app that takes work, and one detached supervisor for each run, which owns the trainer."""
