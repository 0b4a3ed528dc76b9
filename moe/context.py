"""What every block of one forward pass sees beside the residual stream. Letters: B sequences, S tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe.rope import Rope


@dataclass(frozen=True)
class Context:
    """`tokens_BS` are the input's ids, which hash routers route by. Where `document_BS` is given, tokens attend only to equal numbers."""

    tokens_BS: Tensor
    rope: Rope
    document_BS: Tensor | None = None
