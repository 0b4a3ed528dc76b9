"""Multi-head latent attention (DeepSeek-V2, section 2.1): keys and values from one low-rank latent, rotary positions beside it.

Letters: B sequences, S tokens, P kept positions, D width, H heads, R rank of the latent, N dimensions of a head's query without
position, C with one, V of a value.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe.attend import attend, sight_of
from moe.context import Context
from moe.norm import RmsNorm
from moe.rope import attention_scale
from spec import attention as described
from spec.model import Model


class LatentAttention(nn.Module):
    """Keys and values from one low-rank latent; the rotary part of the key is one head that all queries share.

    `kv_up.weight` [H * (N + V), R] holds for each head the rows of its keys, then those of its values.
    """

    def __init__(self, spec: Model, attention: described.LatentAttention, layer: int) -> None:
        super().__init__()
        self.spec, self.layer = attention, layer
        q_width = attention.n_heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
        self.scale = attention_scale(spec, attention.qk_nope_head_dim + attention.qk_rope_head_dim)
        if attention.q_lora_rank:
            self.q_down = nn.Linear(spec.d_model, attention.q_lora_rank, bias=False)
            self.q_norm = RmsNorm(attention.q_lora_rank, attention.norm_eps or spec.norm_eps)
            self.q_up = nn.Linear(attention.q_lora_rank, q_width, bias=False)
        else:
            self.q = nn.Linear(spec.d_model, q_width, bias=False)
        self.kv_down = nn.Linear(spec.d_model, attention.kv_lora_rank + attention.qk_rope_head_dim, bias=False)
        self.kv_norm = RmsNorm(attention.kv_lora_rank, attention.norm_eps or spec.norm_eps)
        self.kv_up = nn.Linear(attention.kv_lora_rank, attention.n_heads * (attention.qk_nope_head_dim + attention.v_head_dim), bias=False)
        self.out = nn.Linear(attention.n_heads * attention.v_head_dim, spec.d_model, bias=False)

    def forward(self, x_BSD: Tensor, context: Context) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        spec = self.spec
        q_flat = self.q_up(self.q_norm(self.q_down(x_BSD))) if spec.q_lora_rank else self.q(x_BSD)
        q_BSHN, q_BSHC = q_flat.unflatten(-1, (spec.n_heads, -1)).split([spec.qk_nope_head_dim, spec.qk_rope_head_dim], dim=-1)
        latent_BSR, k_BSC = self.kv_down(x_BSD).split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1)
        q_BSHC, k_BS1C = context.rope.rotate(q_BSHC), context.rope.rotate(k_BSC.unsqueeze(2))
        latent_BPR, k_BP1C = context.with_past(self.layer, self.kv_norm(latent_BSR), k_BS1C)
        mix = self._merged if context.start else self._expanded
        y: Tensor = self.out(mix(q_BSHN, q_BSHC, latent_BPR, k_BP1C, context))
        return y

    def _expanded(self, q_BSHN: Tensor, q_BSHC: Tensor, latent_BPR: Tensor, k_BP1C: Tensor, context: Context) -> Tensor:
        """Attention over keys and values that are made from the latents: the cheaper way where all of them are new."""
        spec = self.spec
        kv = self.kv_up(latent_BPR).unflatten(-1, (spec.n_heads, -1))
        k_nope, v = kv.split([spec.qk_nope_head_dim, spec.v_head_dim], dim=-1)
        q = torch.cat((q_BSHN, q_BSHC), dim=-1)
        k = torch.cat((k_nope, k_BP1C.expand(-1, -1, spec.n_heads, -1)), dim=-1)
        return attend(q, k, v, sight_of(context, k.shape[1]), None, self.scale)

    def _merged(self, q_BSHN: Tensor, q_BSHC: Tensor, latent_BPR: Tensor, k_BP1C: Tensor, context: Context) -> Tensor:
        """The same over the latents themselves, [B, S, H * V]: the keys' up-projection is applied to the queries, the values' to the result.

        So nothing of a head's width is made for the past (DeepSeek-V2, section 2.1.2).
        """
        spec = self.spec
        up_HRR = self.kv_up.weight.view(spec.n_heads, -1, spec.kv_lora_rank)
        k_up_HNR, v_up_HVR = up_HRR.split([spec.qk_nope_head_dim, spec.v_head_dim], dim=1)
        q = torch.cat((torch.einsum("bshn,hnr->bshr", q_BSHN, k_up_HNR), q_BSHC), dim=-1)
        k = torch.cat((latent_BPR.unsqueeze(2), k_BP1C), dim=-1)
        scale = self.scale or (spec.qk_nope_head_dim + spec.qk_rope_head_dim) ** -0.5
        y_BSHR = attend(q, k, latent_BPR.unsqueeze(2), sight_of(context, k.shape[1]), None, scale).unflatten(-1, (spec.n_heads, -1))
        return torch.einsum("bshr,hvr->bshv", y_BSHR, v_up_HVR).flatten(2)
