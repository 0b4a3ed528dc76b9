"""What generation keeps of the past, so that each new token costs one token: `model(tokens_BS, cache=cache)` goes on where it ended.

    cache = model.eval().new_cache(batch=2)
    logits = model(prompt_BS, cache=cache).logits_BSV
    logits = model(next_B1, cache=cache).logits_BSV

Grouped-query attention keeps keys (rotated) and values, [B, P, G, C] each; latent attention only the normalised latent [B, P, R] and
the shared rotated key [B, P, C] (DeepSeek-V2, section 2.1.2). Layers with a window or chunks let go of what no later token sees.

Letters: B sequences, S new tokens, P kept positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.attention_masked import Sight
from spec.model import Model


class LayerCache:
    """What one layer keeps: its tensors have the positions in their second dimension."""

    def __init__(self, window: int | None, chunk: int | None) -> None:
        self._sight = Sight(window=window, chunk=chunk)
        self.tensors: tuple[Tensor, ...] = ()

    def extend(self, start: int, new: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """What is kept with `new`, [B, S, ...] of positions from `start`, behind it; then only what the next token may see stays."""
        whole = tuple(torch.cat(pair, 1) for pair in zip(self.tensors, new, strict=True)) if self.tensors else new
        following, n_keys = start + new[0].shape[1], whole[0].shape[1]
        kept = min(n_keys, following - self._sight.lowest(following))
        # A slice alone would hold on to all of the memory.
        self.tensors = whole if kept == n_keys else tuple(tensor[:, n_keys - kept :].clone() for tensor in whole)
        return whole


class KvCache:
    """The kept keys and values of all layers for `batch` sequences; `position` is the number of tokens seen.

    `length`, where it is given, is the most tokens it will see. Rotary positions with longrope need it to go beyond the trained
    length: they turn by other frequencies there, and keys that are kept cannot be turned again.
    """

    def __init__(self, spec: Model, batch: int, length: int | None = None) -> None:
        attention = spec.attention
        if attention.kind != "gqa":
            self.layers = [LayerCache(None, None) for _ in range(spec.n_layers)]
        else:
            self.layers = [LayerCache(attention.window_at(layer), attention.chunk_at(layer)) for layer in range(spec.n_layers)]
        self.batch, self.length, self.position = batch, length, 0
        self._rope = spec.rope_scaling
        self._document_BP: Tensor | None = None

    def check(self, tokens_BS: Tensor) -> None:
        """Raises ValueError where `tokens_BS` does not go on with what is kept."""
        if len(tokens_BS) != self.batch:
            raise ValueError(f"the cache is for {self.batch} sequences, not {len(tokens_BS)}")
        if self.length is not None and self.position + tokens_BS.shape[1] > self.length:
            raise ValueError(f"the cache is for {self.length} tokens; it has seen {self.position}, and {tokens_BS.shape[1]} more do not fit")
        if self.length is None and self._rope is not None and self._rope.kind == "longrope":
            trained = self._rope.trained_len
            if 0 < self.position <= trained < self.position + tokens_BS.shape[1]:
                raise ValueError(
                    f"longrope turns by other frequencies beyond rope_scaling.trained_len {trained}: give the cache its length at the start"
                )

    def documents(self, document_BS: Tensor | None) -> Tensor | None:
        """The documents of all positions, `document_BS` those of the new ones. Raises ValueError where earlier calls had them and this has not."""
        if self.position and (document_BS is None) != (self._document_BP is None):
            raise ValueError("documents are given in every call with a cache, or in none")
        if document_BS is not None:
            self._document_BP = document_BS if self._document_BP is None else torch.cat((self._document_BP, document_BS), 1)
        return self._document_BP

    @property
    def size_bytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(tensor.numel() * tensor.element_size() for layer in self.layers for tensor in layer.tensors)
