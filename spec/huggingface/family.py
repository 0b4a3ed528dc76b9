"""What a family is: a `model_type` of config.json that can be read and written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from spec.huggingface.reader import Reader
from spec.model import Model


@dataclass(frozen=True)
class Family:
    """`read` gives the plain fields of a spec's model. `write` says as much of a model as the family has fields for: the caller
    reads it back and compares, so that nothing is lost in silence. Its second argument is the longest context, in tokens.
    """

    model_type: str
    architecture: str
    read: Callable[[Reader], dict[str, Any]]
    write: Callable[[Model, int], dict[str, Any]]
