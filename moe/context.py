"""What every block of one forward pass sees beside the residual stream. Letters: B sequences, S tokens, P positions up to the last."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe.cache import KvCache
from moe.laps import Laps
from moe.rope import Rope


@dataclass(frozen=True)
class Context:
    """`tokens_BS` are the input's ids, which hash routers route by. Where `document_BP` is given, tokens attend only to equal numbers.

    With a `cache` the tokens follow those that it has seen, and P counts these too; without one P is S. `laps` time a sampled step's parts.
    """

    tokens_BS: Tensor
    rope: Rope
    document_BP: Tensor | None = None
    cache: KvCache | None = None
    laps: Laps | None = None

    @property
    def start(self) -> int:
        """Position of the first token."""
        return 0 if self.cache is None else self.cache.position

    def enter(self, part: str, x: Tensor) -> Tensor:
        """`x`, with which a part of the model begins (see Laps.enter)."""
        return x if self.laps is None else self.laps.enter(part, x)

    def with_past(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """`new`, each [B, S, ...], behind what the cache keeps of `layer`; as they are where there is no cache."""
        return new if self.cache is None else self.cache.layers[layer].extend(self.start, new)
