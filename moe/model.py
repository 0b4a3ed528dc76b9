"""A decoder-only transformer whose feed-forward layers are dense or Mixture-of-Experts.

    model = build_model(spec.model)
    output = model(tokens_BS, targets_BS)
    (output.lm_loss + output.balance_loss).backward()

Letters: B sequences, S tokens, D width, V vocabulary, L MoE layers, E experts. Run it under `torch.autocast` for bfloat16:
matrix products then are bfloat16, while weights, residual stream, routers (unless the spec says otherwise) and losses stay float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe import attention_experts, balance
from moe.attention_experts import AttentionRouting, RoutedAttention
from moe.balance_global import GlobalBalance
from moe.block import Block, BlockOutput
from moe.cache import KvCache
from moe.context import Context
from moe.experts import Experts
from moe.laps import Laps
from moe.layer import MoeLayer
from moe.mtp import MtpModule, targets_ahead
from moe.norm import build_norm
from moe.parallel import Mesh
from moe.rope import Rope, rotated_width
from moe.router_policy import judged
from moe.router_unscored import HashRouter
from moe.routing import Choice, LayerOutput, RoutingStats
from spec.model import Model
from spec.trainable import model_problems


@dataclass(frozen=True)
class Output:
    """Of one forward pass. The loss to minimise is `lm_loss + balance_loss`, and `mtp_loss` where there is one."""

    logits_BSV: Tensor | None  # only without targets
    lm_loss: Tensor | None  # mean cross-entropy in nats per token; only with targets
    balance_loss: Tensor  # every balancing term times its coefficient, and what routers add themselves, summed over layers; 0 for a dense model
    stats: RoutingStats | None  # None for a dense model
    mtp_loss: Tensor | None = None  # model.mtp_weight times the mean cross-entropy of the extra blocks; only with these and targets, without a cache
    choices: tuple[Choice, ...] = ()  # of each MoE layer among the blocks


class Transformer(nn.Module):
    """The model. `recompute` keeps only each block's input and runs the block again in the backward pass.

    `moe_layers` are the indices of the statistics' rows: the blocks from 0, and n_layers + i for the block of the i-th extra prediction.
    """

    def __init__(self, spec: Model, *, recompute: bool = False, mesh: Mesh | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.recompute = recompute
        self._compiled: dict[nn.Module, Callable[..., BlockOutput]] = {}
        sparse = spec.moe_layers()
        ahead = range(spec.n_layers, spec.n_layers + spec.mtp_depth) if spec.n_layers - 1 in sparse else ()
        self.moe_layers = (*sparse, *ahead)
        terms = balance.loss_terms(spec.moe.balance) if spec.moe else ()
        self.balance_terms = tuple(term.kind for term in terms)
        self.global_balance = GlobalBalance(terms) if "global_aux" in self.balance_terms else None
        self.embedding = nn.Embedding(spec.vocab_size, spec.d_model)
        self.blocks = nn.ModuleList(Block(spec, index, sparse=index in sparse, mesh=mesh) for index in range(spec.n_layers))
        self.norm = build_norm(spec, spec.final_norm_eps)
        self.head = None if spec.tie_embeddings else nn.Parameter(torch.empty(spec.vocab_size, spec.d_model))
        self.head_bias = nn.Parameter(torch.empty(spec.vocab_size)) if spec.lm_head_bias else None
        with torch.random.fork_rng(devices=[]):  # modules draw when they are made; the other weights stay what they are without these
            self.mtp = nn.ModuleList(MtpModule(spec, mesh) for _ in range(spec.mtp_depth))
        initialise(self)

    def forward(
        self,
        tokens_BS: Tensor,
        targets_BS: Tensor | None = None,
        document_BS: Tensor | None = None,
        cache: KvCache | None = None,
        laps: Laps | None = None,
    ) -> Output:
        """Predict each next token. `targets_BS` holds token ids, or -100 where nothing is to be predicted.

        With `document_BS`, a number for each token's document, attention does not cross from one document to another. With `cache`, in
        evaluation mode alone, the tokens follow those that it has seen, and it sees them too. Raises ValueError where it has no room.
        `laps`, for a sampled step, time the parts.
        """
        embedded_BSD = x_BSD = self.embedding(tokens_BS)
        context = self._context(tokens_BS, document_BS, cache, laps)
        layers: list[BlockOutput] = []
        for block in self.blocks:
            layers.append(self._run(block, x_BSD, context))
            x_BSD = layers[-1].x_BSD
        if cache is not None:
            cache.position += tokens_BS.shape[1]
        logits_BSV = self._logits(self.norm, context.enter("head", x_BSD))
        lm_loss = None
        if targets_BS is not None:
            lm_loss = context.enter("other", F.cross_entropy(logits_BSV.flatten(0, 1).float(), targets_BS.flatten()))
            layers = self._judged(layers, logits_BSV, targets_BS)
        mtp_loss = None
        if len(self.mtp) and targets_BS is not None and cache is None:  # an extra block has no place in a cache
            ahead, mtp_loss = self._predict_ahead(x_BSD, embedded_BSD, targets_BS, context)
            layers += ahead
        routed = [layer.ffn for layer in layers if layer.ffn is not None]
        attending = [layer.attention for layer in layers if layer.attention is not None]
        losses = [layer.loss for layer in routed] + [layer.loss for layer in attending]
        stats = _stats(routed, attending)
        if self.global_balance is not None and stats is not None:
            value_L = self.global_balance.value(routed, training=self.training, laps=laps)
            losses.append(self.global_balance.coefficient * value_L.sum())
            stats = self.global_balance.shown(stats, value_L)
        return Output(
            logits_BSV=logits_BSV if targets_BS is None else None,
            lm_loss=lm_loss,
            balance_loss=torch.stack(losses).sum() if losses else x_BSD.new_zeros((), dtype=torch.float32),
            stats=stats,
            mtp_loss=mtp_loss,
            choices=tuple(layer.ffn.choice for layer in layers[: len(self.blocks)] if layer.ffn is not None),
        )

    def _logits(self, norm: nn.Module, x_BSD: Tensor) -> Tensor:
        return F.linear(norm(x_BSD), self.embedding.weight if self.head is None else self.head, self.head_bias)

    def _predict_ahead(self, x_BSD: Tensor, embedded_BSD: Tensor, targets_BS: Tensor, context: Context) -> tuple[list[BlockOutput], Tensor]:
        """What the extra blocks' routers did, and the weighted mean of their losses (DeepSeek-V3, eq. 21-25)."""
        if x_BSD.shape[1] <= len(self.mtp):
            raise ValueError(f"model.mtp_depth {len(self.mtp)} needs sequences of more tokens than that, not of {x_BSD.shape[1]}")
        layers: list[BlockOutput] = []
        losses = []
        for depth, module in enumerate(self.mtp, 1):
            assert isinstance(module, MtpModule)
            merged_BSD = module.merge(x_BSD[:, :-1], embedded_BSD[:, depth:])
            document_BS = None if context.document_BP is None else context.document_BP[:, :-depth]
            layer = self._run(module.block, merged_BSD, replace(context, tokens_BS=context.tokens_BS[:, depth:], document_BP=document_BS))
            x_BSD = layer.x_BSD
            logits_BSV = self._logits(module.norm, context.enter("head", x_BSD))
            target_BS = targets_ahead(targets_BS, context.document_BP, depth)
            total = F.cross_entropy(logits_BSV.flatten(0, 1).float(), target_BS.flatten(), reduction="sum")
            losses.append(context.enter("other", total) / (target_BS != -100).sum().clamp_min(1))
            layers += self._judged([layer], logits_BSV, target_BS)
        return layers, self.spec.mtp_weight * torch.stack(losses).mean()

    def _judged(self, layers: list[BlockOutput], logits_BSV: Tensor, targets_BS: Tensor) -> list[BlockOutput]:
        """`layers`, in which each router that learns by policy gradient has got its loss from the tokens' losses."""
        if self.spec.moe is None or all(layer.ffn is None or layer.ffn.log_prob_T is None for layer in layers):
            return layers
        weight, target_T = self.spec.moe.router.policy_weight, targets_BS.flatten()
        with torch.no_grad():
            loss_T = F.cross_entropy(logits_BSV.flatten(0, 1).float(), target_T, reduction="none")
        return [layer if layer.ffn is None else layer._replace(ffn=judged(layer.ffn, loss_T, target_T, weight)) for layer in layers]

    def new_cache(self, batch: int, length: int | None = None) -> KvCache:
        """An empty cache for `batch` sequences of at most `length` tokens (see moe.cache)."""
        return KvCache(self.spec, batch, length)

    def _context(self, tokens_BS: Tensor, document_BS: Tensor | None, cache: KvCache | None, laps: Laps | None) -> Context:
        start, length, most = 0, tokens_BS.shape[1], None
        if cache is not None:
            if self.training:
                raise ValueError("a cache is for evaluation mode")
            cache.check(tokens_BS)
            document_BS = cache.documents(document_BS)
            start, most = cache.position, cache.length
        spec = self.spec
        rope = Rope(length, rotated_width(spec), spec.rope_theta, tokens_BS.device, start=start, scaling=spec.rope_scaling, most=most)
        return Context(tokens_BS, rope, document_BS, cache, laps)

    def _run(self, block: nn.Module, x_BSD: Tensor, context: Context) -> BlockOutput:
        run = self._compiled.get(block, block) if self.training else block
        if self.recompute and self.training and torch.is_grad_enabled():
            return checkpoint(run, x_BSD, context, use_reentrant=False)  # type: ignore[no-any-return]
        return run(x_BSD, context)

    def compile_blocks(self, backend: str = "inductor", *, whole: bool = False) -> None:
        """From now on training runs each block through torch.compile, where blocks of one kind share their code; evaluation does not.

        What experts on other ranks are sent is known only while it runs: their exchange is left out. With `whole` it is an error where a
        block cannot be one graph.
        """
        for module in self.modules():
            if isinstance(module, Experts) and module.mesh is not None:
                module.forward = torch.compiler.disable(module.forward)  # type: ignore[method-assign]
        blocks = [*self.blocks, *(module.block for module in self.mtp)]
        options: dict[str, Any] | None = {"fallback_random": True} if backend == "inductor" else None  # the draws that it makes uncompiled
        self._compiled = {block: torch.compile(block, backend=backend, fullgraph=whole, options=options) for block in blocks}

    @property
    def is_compiled(self) -> bool:
        """Whether training goes through torch.compile."""
        return bool(self._compiled)

    @contextmanager
    def experts_cast(self, dtype: torch.dtype, laps: Laps | None = None) -> Iterator[None]:
        """Within it experts' matrices are cast to `dtype` once, for all passes: the weights must not change. Gradients are the weights' own."""
        experts = [module for module in self.modules() if isinstance(module, Experts) and module.w_in.dtype != dtype]
        if laps is not None and experts:
            laps.mark("experts")
        for module in experts:
            module.cast(dtype)
        if laps is not None and experts:
            laps.mark("other")
        try:
            yield
        finally:
            for module in experts:
                module.casts = None

    def begin_step(self) -> None:
        """Called before the first micro-batch of an optimiser step: what balances over whole steps starts anew."""
        if self.global_balance is not None:
            self.global_balance.begin_step()

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
        """The routers' parameters, which the optimiser may give a learning rate of their own."""
        attention = [module.router for module in self.modules() if isinstance(module, RoutedAttention)]
        return [parameter for layer in self._moe_layers() for parameter in layer.router.parameters()] + attention

    def hash_routers(self) -> list[HashRouter]:
        """The routers with a table, which is better filled by what the corpus tells of its tokens (HashRouter.fill)."""
        return [layer.router for layer in self._moe_layers() if isinstance(layer.router, HashRouter)]

    def _moe_layers(self) -> list[MoeLayer]:
        return [module for module in self.modules() if isinstance(module, MoeLayer)]


def _stats(routed: list[LayerOutput], attending: list[AttentionRouting]) -> RoutingStats | None:
    """Of the MoE layers, with what attention experts did among the figures."""
    if not routed:
        return None
    stats = RoutingStats.stacked([layer.stats for layer in routed])
    if not attending:
        return stats
    tokens_LE = torch.stack([layer.tokens_E for layer in attending])
    return replace(stats, attention_tokens_LE=tokens_LE, figures={**stats.figures, **attention_experts.figures(attending)})


@torch.no_grad()
def initialise(model: Transformer) -> None:
    """Normal matrices of `init_std` (routers: their own), norms at one, biases at zero; drawn in the parameters' order."""
    routers = {id(weight) for weight in model.router_parameters()}
    experts = {id(weight): module for module in model.modules() if isinstance(module, Experts) for weight in module.parameters()}
    router_std = model.spec.moe.router.init_std if model.spec.moe else 0.0
    for parameter in model.parameters():
        if id(parameter) in experts:
            experts[id(parameter)].draw(parameter, model.spec.init_std)
        elif parameter.dim() >= 2:
            parameter.normal_(0.0, router_std if id(parameter) in routers else model.spec.init_std)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", ".b_in", ".b_out")):
            parameter.zero_()


def build_model(spec: Model, *, recompute: bool = False, mesh: Mesh | None = None) -> Transformer:
    """The spec's model with fresh weights, on torch's current default device, from torch's current seed.

    With a `mesh` it has those experts that this rank holds, of the very model that one process would build.
    Raises ValueError, naming the fields, for what `spec.trainable` says cannot be trained.
    """
    problems = list(model_problems(spec))
    if problems:
        raise ValueError("; ".join(map(str, problems)))
    return Transformer(spec, recompute=recompute, mesh=mesh)
