"""Validations: bits per byte and who takes which tokens, against loops; and whole runs with each tokenizer, mixture and packing."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moe.train.ranks import Ranks
from moe.train.token_classes import CLASSES
from moe.train.validation import Validation, validate
from spec import events
from tests.moe.train.tiny import Run, tiny


def validation(run: Run, *, sequences: int = 6) -> Validation:
    found = validate(
        run.learner.model,
        run.learner.batches,
        sequences=sequences,
        micro_batch=4,
        ranks=Ranks(0, 1, torch.device("cpu")),
        autocast=run.learner.autocast,
        interrupted=lambda: False,
        specialisation=True,
    )
    assert found is not None
    return found


SPECS: dict[str, dict[str, dict[str, Any]]] = {
    "bytes": {"data": {"domains": ["tables", "prose"]}},
    "byte pairs": {"data": {"domains": ["tables", "prose"], "tokenizer": "bpe", "bpe_vocab_size": 400}, "model": {"vocab_size": 400}},
    "weights": {"data": {"domains": ["tables", "prose"], "weights": [1, 3]}},
    "documents": {"data": {"domains": ["tables", "prose"], "packing": "documents", "seq_len": 256}},
    "capacity": {
        "data": {"domains": ["tables"]},
        "model": {"moe": {"n_experts": 4, "top_k": 2, "d_expert": 32, "capacity": {"kind": "factor", "eval_factor": 0.6}}},
    },
}


def start(kind: str, out: Path) -> Run:
    changes = SPECS[kind]
    base = tiny()
    model = {**base.model.model_dump(exclude_unset=True), **changes.get("model", {})}
    data = {**base.data.model_dump(exclude_unset=True), **changes["data"]}
    return Run(tiny(model=model, data=data, training={"steps": 3, "batch_size": 4, "eval_every": 0, "eval_batches": 1}), out)


@pytest.mark.parametrize("kind", SPECS)
def test_a_validation_counts_what_a_loop_counts(kind: str, tmp_path: Path) -> None:
    run = start(kind, tmp_path / "run")
    batches, model = run.learner.batches, run.learner.model
    found = validation(run)
    losses: list[float] = []
    nats, n_bytes, n_tokens = Counter[str](), Counter[str](), Counter[str]()
    taken: Counter[tuple[int, int, str]] = Counter()
    domains: Counter[tuple[int, int, str]] = Counter()
    totals: Counter[str] = Counter()
    model.eval()
    for index, domain in enumerate(batches.domains):
        rows = batches.validation(index, 6)
        classes = batches.validation_classes(index, 6)
        for begin in range(0, len(rows), 4):  # capacity depends on who shares the batch
            tokens, targets = batches.tokens_and_targets(rows[begin : begin + 4])
            with torch.no_grad():
                answer = model(tokens, None, batches.documents(tokens))
            log_prob = answer.logits_BSV.double().log_softmax(-1)
            for b, s in np.ndindex(*targets.shape):
                target = int(targets[b, s])
                if target >= 0:
                    nats[domain.name] -= float(log_prob[b, s, target])
                    n_bytes[domain.name] += len(batches.vocabulary.bytes_of[target])
                    n_tokens[domain.name] += 1
                name = CLASSES[classes[begin + b, s]]
                totals[name] += 1
                for layer, choice in enumerate(answer.choices):
                    for expert in choice.expert_TK[b * targets.shape[1] + s].tolist():
                        if expert < model.spec.moe.n_experts:  # type: ignore[union-attr]
                            taken[layer, expert, name] += 1
                            domains[layer, expert, domain.name] += 1
        losses.append(nats[domain.name] / n_tokens[domain.name])
        assert found.by_domain[domain.name] == pytest.approx(losses[-1], rel=1e-5)
    weights = run.learner.spec.data.weights
    if weights:
        share = np.array(weights) / sum(weights)
        assert found.loss == pytest.approx(float(share @ losses), rel=1e-5)
        per_token = [n_bytes[name] / n_tokens[name] for name in found.by_domain]
        assert found.bits_per_byte == pytest.approx(float(share @ losses) / float(share @ per_token) / math.log(2), rel=1e-5)
    else:
        assert found.loss == pytest.approx(nats.total() / n_tokens.total(), rel=1e-5)
        assert found.bits_per_byte == pytest.approx(nats.total() / n_bytes.total() / math.log(2), rel=1e-5)
    counted = found.specialisation
    assert counted is not None
    assert {name: n for name, n in counted.classes.items() if n} == totals
    expected = [[[taken[layer, expert, name] for name in CLASSES] for expert in range(4)] for layer in range(2)]
    assert counted.class_tokens.tolist() == expected
    assert counted.domain_tokens.tolist() == [
        [[domains[layer, expert, name] for name in counted.domains] for expert in range(4)] for layer in range(2)
    ]
    if kind == "capacity":
        assert counted.class_tokens.sum() < 2 * 2 * sum(counted.classes.values()), "what was dropped is not counted"
    else:
        assert counted.class_tokens.sum() == 2 * 2 * sum(counted.classes.values())


def test_ranks_share_a_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = start("weights", tmp_path / "run")
    sums: list[torch.Tensor] = []
    monkeypatch.setattr(Ranks, "gather", lambda self, own: (sums.append(own), own[None])[1])
    for rank, size in ((0, 1), (0, 2), (1, 2)):
        ranks = Ranks(rank, size, torch.device("cpu"))
        learner = run.learner
        shared = {"sequences": 7, "micro_batch": 2, "autocast": learner.autocast, "interrupted": lambda: False, "specialisation": True}
        assert validate(learner.model, learner.batches, ranks=ranks, **shared)
    torch.testing.assert_close(sums[1] + sums[2], sums[0], rtol=1e-6, atol=1e-6)


ROUTERS: list[dict[str, Any]] = [
    {"kind": "expert_choice"},
    {"kind": "hash"},
    {"kind": "random"},
    {"kind": "all_experts"},
    {"kind": "gshard"},
]


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router["kind"])
def test_every_kind_of_router_is_counted(router: dict[str, Any], tmp_path: Path) -> None:
    top_k = 4 if router["kind"] == "all_experts" else 2
    moe = {"n_experts": 4, "top_k": top_k, "d_expert": 32, "router": router, "balance": []}
    model = {**tiny().model.model_dump(exclude_unset=True), "moe": moe, "mtp_depth": 1}
    run = Run(tiny(model=model, training={"steps": 1, "batch_size": 4, "eval_every": 0, "eval_batches": 1}), tmp_path / "run")
    run.go()
    (counted,) = [event for event in run.events if isinstance(event, events.SpecialisationCounted)]
    tokens = sum(counted.classes.values())
    assert counted.class_tokens.shape == (3, 4, len(CLASSES))
    taken = counted.class_tokens.sum((1, 2))
    assert taken[:2].tolist() == [top_k * tokens] * 2
    assert not taken[2], "the extra prediction's block sees other tokens"


@pytest.mark.parametrize("kind", SPECS)
def test_a_run_of_each_kind_trains_and_tells(kind: str, tmp_path: Path) -> None:
    run = start(kind, tmp_path / "run")
    end = run.go()
    assert end.step == 3
    assert math.isfinite(end.loss)
    told = run.events
    (evaluated,) = [event for event in told if isinstance(event, events.EvalDone)]
    (counted,) = [event for event in told if isinstance(event, events.SpecialisationCounted)]
    assert evaluated.bits_per_byte is not None
    assert evaluated.bits_per_byte > 0
    assert counted.step == evaluated.step == 3
    assert list(counted.classes) == list(CLASSES)
    assert list(counted.domains) == list(evaluated.by_domain)
    assert counted.class_tokens.shape == (2, 4, len(CLASSES))
    np.testing.assert_array_equal(counted.class_tokens.sum(2), counted.domain_tokens.sum(2))


def test_by_document_nothing_depends_on_the_document_before(tmp_path: Path) -> None:
    run = start("documents", tmp_path / "run")
    batches, model = run.learner.batches, run.learner.model.eval()
    tokens = torch.randint(0, 256, (1, 40))
    tokens[0, 19] = batches.vocabulary.separator
    other = tokens.clone()
    other[0, :19] = torch.randint(0, 256, (19,))
    with torch.no_grad():
        one, two = (model(each, None, batches.documents(each)).logits_BSV for each in (tokens, other))
        stream = model(other).logits_BSV
    torch.testing.assert_close(one[0, 20:], two[0, 20:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(two[0, 20:], stream[0, 20:], rtol=1e-3, atol=1e-4)


def test_specialisation_can_be_switched_off(tmp_path: Path) -> None:
    run = Run(tiny(training={"steps": 2}, telemetry={"specialisation": False}), tmp_path / "run")
    run.go()
    assert not [event for event in run.events if isinstance(event, events.SpecialisationCounted)]


def test_a_dense_model_has_nothing_to_count(tmp_path: Path) -> None:
    run = Run(tiny(model={"n_layers": 1, "d_model": 32, "d_ff": 64, "moe": None}, training={"steps": 2}), tmp_path / "run")
    run.go()
    assert not [event for event in run.events if isinstance(event, events.SpecialisationCounted)]
    assert [event.bits_per_byte for event in run.events if isinstance(event, events.EvalDone)][0] is not None
