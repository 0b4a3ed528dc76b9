"""Multi-token prediction (DeepSeek-V3, section 2.2): extra blocks, each of which predicts one token further ahead.

Depth k merges what depth k - 1 says of token i (depth 0: the residual stream after the last layer, before its norm) with the embedding
of token i + k, runs a block over it, and predicts token i + k + 1 through the model's own output projection.

Letters: B sequences, S positions that have a token k ahead, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.block import Block
from moe.norm import build_norm
from moe.parallel import Mesh
from spec.model import Model


class MtpModule(nn.Module):
    """One depth: h' = M [norm(h); norm(e)] (eq. 21), a block of the last layer's kind (eq. 22), and the norm before the projection.

    `project.weight` [D, 2 D] takes the stream in its first D columns and the embedding in the others. Embedding and output projection
    are the model's.
    """

    def __init__(self, spec: Model, mesh: Mesh | None = None) -> None:
        super().__init__()
        last = spec.n_layers - 1
        self.stream_norm = build_norm(spec)
        self.embedding_norm = build_norm(spec)
        self.project = nn.Linear(2 * spec.d_model, spec.d_model, bias=False)
        self.block = Block(spec, last, sparse=last in spec.moe_layers(), mesh=mesh)
        self.norm = build_norm(spec)

    def merge(self, h_BSD: Tensor, embedded_BSD: Tensor) -> Tensor:
        """The block's input, [B, S, D]."""
        merged: Tensor = self.project(torch.cat((self.stream_norm(h_BSD), self.embedding_norm(embedded_BSD)), dim=-1))
        return merged


def targets_ahead(targets_BS: Tensor, document_BS: Tensor | None, depth: int) -> Tensor:
    """What depth `depth` predicts at each position but the last `depth`: token ids, -100 for nothing.

    Nothing where the token that is merged in is of another document: the stream knows nothing of it.
    """
    ahead = targets_BS[:, depth:]
    if document_BS is None:
        return ahead
    return ahead.where(document_BS[:, depth:] == document_BS[:, :-depth], -100)
