"""Clients of the API for each of the people."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from django.contrib.auth.models import User
from rest_framework.test import APIClient

from experiments.actions.token import issue
from tests.experiments.engine import people

Speak = Callable[..., APIClient]


@pytest.fixture
def as_user(db: None) -> Speak:
    """A client that speaks with a fresh token of the user."""

    def client(user: User | None = None, *scopes: str) -> APIClient:
        speaking = APIClient(raise_request_exception=False)
        secret = issue(user=user or people.ada(), name="test", scopes=scopes or ("admin",)).secret
        speaking.credentials(HTTP_AUTHORIZATION=f"Bearer {secret}")
        return speaking

    return client


@pytest.fixture
def ada(as_user: Speak) -> APIClient:
    """Ada, who edits the default project."""
    return as_user()
