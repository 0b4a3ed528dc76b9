"""Memory that a kernel may not read holds NaN."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh memory holds NaN (the largest number where it is of integers), so that reading what was never written shows."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
