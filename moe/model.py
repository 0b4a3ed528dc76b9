"""A decoder-only transformer whose feed-forward layers are dense or Mixture-of-Experts.

    model = build_model(spec.model)
    output = model(tokens_BS, targets_BS)
    (output.lm_loss + output.balance_loss).backward()

Letters: B sequences, S tokens, D width, V vocabulary, L MoE layers, E experts. Run it under `torch.autocast` for bfloat16:
matrix products then are bfloat16, while weights, residual stream, routers (unless the spec says otherwise) and losses stay float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe import balance
from moe.attention import build_attention
from moe.cache import KvCache
from moe.context import Context
from moe.feedforward import FeedForward
from moe.layer import MoeLayer
from moe.norm import build_norm
from moe.rope import Rope, rotated_width
from moe.routing import Choice, LayerOutput, RoutingStats
from spec.model import Model
from spec.trainable import model_problems


@dataclass(frozen=True)
class Output:
    """Of one forward pass. The loss to minimise is `lm_loss + balance_loss`."""

    logits_BSV: Tensor | None  # only without targets
    lm_loss: Tensor | None  # mean cross-entropy in nats per token; only with targets
    balance_loss: Tensor  # every balancing term times its coefficient, summed over layers; 0 for a dense model
    stats: RoutingStats | None  # None for a dense model
    choices: tuple[Choice, ...] = ()  # of each MoE layer


class Block(nn.Module):
    """Pre-norm residual block: attention, then a feed-forward or MoE layer."""

    def __init__(self, spec: Model, layer: int, *, sparse: bool) -> None:
        super().__init__()
        self.attention_norm = build_norm(spec)
        self.attention = build_attention(spec, layer)
        self.ffn_norm = build_norm(spec)
        self.ffn: MoeLayer | FeedForward = MoeLayer(spec) if sparse else FeedForward(spec.d_model, spec.d_ff, spec.activation)
        self.dropout = nn.Dropout(spec.dropout)

    def forward(self, x_BSD: Tensor, context: Context) -> tuple[Tensor, LayerOutput | None]:
        """The residual stream after the block, and what a MoE layer in it says."""
        x_BSD = x_BSD + self.dropout(self.attention(self.attention_norm(x_BSD), context))
        u_BSD = self.ffn_norm(x_BSD)
        if isinstance(self.ffn, MoeLayer):
            routed: LayerOutput = self.ffn(u_BSD, context)
            return x_BSD + self.dropout(routed.y_BSD), routed
        return x_BSD + self.dropout(self.ffn(u_BSD)), None


class Transformer(nn.Module):
    """The model. `recompute` keeps only each block's input and runs the block again in the backward pass."""

    def __init__(self, spec: Model, *, recompute: bool = False) -> None:
        super().__init__()
        self.spec = spec
        self.recompute = recompute
        self.moe_layers = tuple(spec.moe_layers())
        self.balance_terms = tuple(term.kind for term in balance.loss_terms(spec.moe.balance)) if spec.moe else ()
        self.embedding = nn.Embedding(spec.vocab_size, spec.d_model)
        self.blocks = nn.ModuleList(Block(spec, index, sparse=index in self.moe_layers) for index in range(spec.n_layers))
        self.norm = build_norm(spec)
        self.head = None if spec.tie_embeddings else nn.Parameter(torch.empty(spec.vocab_size, spec.d_model))
        self.head_bias = nn.Parameter(torch.empty(spec.vocab_size)) if spec.lm_head_bias else None
        initialise(self)

    def forward(self, tokens_BS: Tensor, targets_BS: Tensor | None = None, document_BS: Tensor | None = None, cache: KvCache | None = None) -> Output:
        """Predict each next token. `targets_BS` holds token ids, or -100 where nothing is to be predicted.

        With `document_BS`, a number for each token's document, attention does not cross from one document to another. With `cache`, in
        evaluation mode alone, the tokens follow those that it has seen, and it sees them too. Raises ValueError where it has no room.
        """
        x_BSD = self.embedding(tokens_BS)
        context = self._context(tokens_BS, document_BS, cache)
        routed: list[LayerOutput] = []
        for block in self.blocks:
            x_BSD, layer = self._run(block, x_BSD, context)
            if layer is not None:
                routed.append(layer)
        if cache is not None:
            cache.position += tokens_BS.shape[1]
        logits_BSV = F.linear(self.norm(x_BSD), self.embedding.weight if self.head is None else self.head, self.head_bias)
        lm_loss = None if targets_BS is None else F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten())
        return Output(
            logits_BSV=logits_BSV if targets_BS is None else None,
            lm_loss=lm_loss,
            balance_loss=torch.stack([layer.loss for layer in routed]).sum() if routed else x_BSD.new_zeros((), dtype=torch.float32),
            stats=RoutingStats.stacked([layer.stats for layer in routed]) if routed else None,
            choices=tuple(layer.choice for layer in routed),
        )

    def new_cache(self, batch: int, length: int | None = None) -> KvCache:
        """An empty cache for `batch` sequences of at most `length` tokens (see moe.cache)."""
        return KvCache(self.spec, batch, length)

    def _context(self, tokens_BS: Tensor, document_BS: Tensor | None, cache: KvCache | None) -> Context:
        start, length, most = 0, tokens_BS.shape[1], None
        if cache is not None:
            if self.training:
                raise ValueError("a cache is for evaluation mode")
            cache.check(tokens_BS)
            document_BS = cache.documents(document_BS)
            start, most = cache.position, cache.length
        spec = self.spec
        rope = Rope(length, rotated_width(spec), spec.rope_theta, tokens_BS.device, start=start, scaling=spec.rope_scaling, most=most)
        return Context(tokens_BS, rope, document_BS, cache)

    def _run(self, block: nn.Module, x_BSD: Tensor, context: Context) -> tuple[Tensor, LayerOutput | None]:
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(block, x_BSD, context, use_reentrant=False)  # type: ignore[no-any-return]
        return block(x_BSD, context)  # type: ignore[no-any-return]

    def update_balance(self, stats: RoutingStats) -> None:
        """Move the loss-free biases, in place: once per optimiser step, with the counts of the whole step over all ranks.

        Does nothing in evaluation mode or where the spec has no loss-free bias.
        """
        if not self.training:
            return
        for layer, count_E in zip(self._moe_layers(), stats.expert_tokens_LE, strict=True):
            if layer.router.bias_E is not None and layer.bias_rate is not None:
                balance.update_bias(layer.router.bias_E, count_E, layer.bias_rate)

    def expert_bias(self) -> Tensor | None:
        """The loss-free selection biases, float32[L, E]; None where the spec has none."""
        biases = [layer.router.bias_E for layer in self._moe_layers() if layer.router.bias_E is not None]
        return torch.stack(biases) if biases else None

    def router_parameters(self) -> list[nn.Parameter]:
        """The routers' weights, which the optimiser may give a learning rate of their own."""
        return [layer.router.weight for layer in self._moe_layers()]

    def _moe_layers(self) -> list[MoeLayer]:
        return [module for module in self.modules() if isinstance(module, MoeLayer)]


@torch.no_grad()
def initialise(model: Transformer) -> None:
    """Normal matrices of `init_std` (routers: their own), norms at one, biases at zero; drawn in the parameters' order."""
    routers = {id(weight) for weight in model.router_parameters()}
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            router_std = model.spec.moe.router.init_std if model.spec.moe else 0.0
            parameter.normal_(0.0, router_std if id(parameter) in routers else model.spec.init_std)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()


def build_model(spec: Model, *, recompute: bool = False) -> Transformer:
    """The spec's model with fresh weights, on torch's current default device, from torch's current seed.

    Raises ValueError, naming the fields, for what `spec.trainable` says cannot be trained.
    """
    problems = list(model_problems(spec))
    if problems:
        raise ValueError("; ".join(map(str, problems)))
    return Transformer(spec, recompute=recompute)
