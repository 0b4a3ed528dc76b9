"""Text from a model, token by token, with the experts of each token in each MoE layer.

    written = write(model.eval(), [104, 105], Sampling(tokens=20, temperature=0.8), vocabulary_size=257, end=256)

Letters: S tokens so far, V vocabulary, N tokens of the tokenizer, T tokens in the end, L MoE layers, K chosen per token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe.model import Transformer
from moe.routing import Choice
from spec.model import Model


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Temperature 0 takes the most probable; `top_k` 0 means all."""

    tokens: int = 64
    temperature: float = 0.8
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


@dataclass
class Written:
    """T tokens, the prompt first. `log_probs` are the model's own (temperature 1, nats), None for the first token, which nothing precedes.

    `experts` and `gates` are [T][L][at most K], without the places where no expert ran.
    """

    ids: list[int]
    prompt_tokens: int
    log_probs: list[float | None] = field(default_factory=list)
    experts: list[list[list[int]]] = field(default_factory=list)
    gates: list[list[list[float]]] = field(default_factory=list)
    ended: bool = False  # the model has ended the document


def depends_on_batch(spec: Model) -> bool:
    """Whether a token's experts depend on the tokens that are routed with it: under a capacity, and where experts choose tokens."""
    return spec.moe is not None and (spec.moe.capacity.kind != "dropless" or spec.moe.router.kind == "expert_choice")


@torch.inference_mode()
def write(model: Transformer, prompt: Sequence[int], sampling: Sampling, *, vocabulary_size: int, end: int) -> Written:
    """Goes on from `prompt` (at least one id) until `sampling.tokens` are written or `end` was. Only ids below `vocabulary_size` are drawn.

    Where routing depends on the batch, every token is routed anew with the whole text each time, as in training; else a cache is kept.
    Raises ValueError for an empty prompt.
    """
    if not prompt:
        raise ValueError("prompt: there must be a token to go on from")
    generator = torch.Generator().manual_seed(sampling.seed)
    written = Written(list(prompt), len(prompt))
    reader = _Again(model) if depends_on_batch(model.spec) else _Cached(model, len(prompt) + sampling.tokens)
    logits_SV = reader.read(written.ids)
    written.log_probs = [None, *_log_probs(logits_SV[:-1], written.ids[1:])]
    for _ in range(sampling.tokens):
        token = draw(logits_SV[-1, :vocabulary_size], sampling, generator)
        written.log_probs += _log_probs(logits_SV[-1:], [token])
        written.ids.append(token)
        logits_SV = reader.read(written.ids)  # the last token, too: its experts are asked for
        if token == end:
            written.ended = True
            break
    written.experts, written.gates = reader.choices(len(written.ids), model.spec.moe.n_experts if model.spec.moe else 0)
    return written


def draw(logits_N: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token from softmax(logits / temperature), cut to the `top_k` most probable and then to the nucleus of `top_p` (Holtzman 2020)."""
    logits_N = logits_N.float().cpu()
    if sampling.temperature == 0:
        return int(logits_N.argmax())
    prob_N, token_N = (logits_N.double() / sampling.temperature).softmax(-1).sort(descending=True, stable=True)
    if sampling.top_k:
        prob_N = prob_N[: sampling.top_k]
    prob_N = prob_N / prob_N.sum()
    # The nucleus is the smallest head whose mass reaches top_p: what stands before its last token does not.
    prob_N = prob_N[prob_N.cumsum(-1) - prob_N < sampling.top_p]
    return int(token_N[torch.multinomial(prob_N, 1, generator=generator)])


def _log_probs(logits_SV: Tensor, next_ids: Sequence[int]) -> list[float | None]:
    log_prob_SV = logits_SV.float().log_softmax(-1)
    return [float(log_prob_V[token]) for log_prob_V, token in zip(log_prob_SV, next_ids, strict=True)]


class _Cached:
    """Reads each token once."""

    def __init__(self, model: Transformer, length: int) -> None:
        self._model, self._cache, self._seen = model, model.new_cache(1, length), 0
        self._steps: list[tuple[Choice, ...]] = []

    def read(self, ids: Sequence[int]) -> Tensor:
        """The logits [new, V] of the tokens that were not read yet."""
        new_BS = torch.tensor([ids[self._seen :]], device=self._model.embedding.weight.device)
        self._seen = len(ids)
        output = self._model(new_BS, cache=self._cache)
        self._steps.append(output.choices)
        logits_SV: Tensor = output.logits_BSV[0]
        return logits_SV

    def choices(self, tokens: int, n_experts: int) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
        return _by_token(self._steps, tokens, n_experts)


class _Again:
    """Reads everything each time."""

    def __init__(self, model: Transformer) -> None:
        self._model = model
        self._last: tuple[Choice, ...] = ()

    def read(self, ids: Sequence[int]) -> Tensor:
        """The logits [S, V] of all tokens."""
        output = self._model(torch.tensor([ids], device=self._model.embedding.weight.device))
        self._last = output.choices
        logits_SV: Tensor = output.logits_BSV[0]
        return logits_SV

    def choices(self, tokens: int, n_experts: int) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
        return _by_token([self._last], tokens, n_experts)


def _by_token(steps: Sequence[tuple[Choice, ...]], tokens: int, n_experts: int) -> tuple[list[list[list[int]]], list[list[list[float]]]]:
    """[T][L][chosen] experts and gates from the choices of consecutive passes, each of some tokens."""
    experts: list[list[list[int]]] = [[] for _ in range(tokens)]
    gates: list[list[list[float]]] = [[] for _ in range(tokens)]
    start = 0
    for step in steps:
        for expert_TK, gate_TK in step:
            for at, (expert_K, gate_K) in enumerate(zip(expert_TK.tolist(), gate_TK.float().tolist(), strict=True), start):
                ran = [(expert, gate) for expert, gate in zip(expert_K, gate_K, strict=True) if expert < n_experts]
                experts[at].append([expert for expert, _ in ran])
                gates[at].append([gate for _, gate in ran])
        start += len(step[0].expert_TK) if step else 0
    return experts, gates
