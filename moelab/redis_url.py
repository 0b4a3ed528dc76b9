"""One REDIS_URL, in redis-py's form, and what Celery calls the same server."""

from __future__ import annotations

from urllib.parse import parse_qs, urlsplit


def celery_broker(url: str) -> str:
    """`url` for Celery: `unix:///path?db=1` becomes `redis+socket:///path?virtual_host=1`; TCP forms stay as they are.

    Raises ValueError for a scheme that is none of unix, redis and rediss.
    """
    parts = urlsplit(url)
    if parts.scheme in ("redis", "rediss"):
        return url
    if parts.scheme != "unix":
        raise ValueError(f"REDIS_URL starts with {parts.scheme or url!r}; it must be unix://, redis:// or rediss://")
    query = parse_qs(parts.query)
    options = f"virtual_host={query.get('db', ['0'])[0]}"
    if parts.password:
        options += f"&password={parts.password}"
    return f"redis+socket://{parts.path}?{options}"
