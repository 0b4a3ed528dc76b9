"""Slows down guessing: ten tries per account and minute, counted in PostgreSQL for accounts known and unknown alike."""

from __future__ import annotations

import hashlib

from django.db import connection

TRIES_PER_MINUTE = 10
_COUNT = """
INSERT INTO experiments_loginthrottle (account, minute, tries) VALUES (%s, date_trunc('minute', now()), 1)
ON CONFLICT (account, minute) DO UPDATE SET tries = experiments_loginthrottle.tries + 1
RETURNING tries, ceil(60 - extract(second FROM now()))::int
"""
_FORGET = "DELETE FROM experiments_loginthrottle WHERE minute < now() - interval '1 hour'"


def seconds_to_wait(username: str) -> int:
    """Counts one try to sign in as `username`: 0 if it may be evaluated, else the seconds until the next one may.

    Call it before the password is looked at, whatever the name: the answer must not tell whether the account exists.
    """
    account = hashlib.sha256(username.strip().lower().encode("utf-8", "surrogatepass")).hexdigest()
    with connection.cursor() as cursor:
        cursor.execute(_COUNT, [account])
        tries, left_s = cursor.fetchone()
        if tries == 1:
            cursor.execute(_FORGET)
    return int(left_s) if tries > TRIES_PER_MINUTE else 0
