"""Secrets that are shown once and stored as their SHA-256 (256 random bits need no slow hash)."""

from __future__ import annotations

import hashlib
import secrets


def make(prefix: str) -> str:
    """A new secret of 256 bits; `prefix` tells people and leak scanners what it is."""
    return prefix + secrets.token_urlsafe(32)


def digest(secret: str) -> str:
    """What is stored of it: 64 hex digits."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
