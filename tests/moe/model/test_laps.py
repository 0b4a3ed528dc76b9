"""Timing the parts of a step changes no number, and its marks follow the parts forward, backward and through recomputation."""

from __future__ import annotations

from itertools import groupby

import pytest
import torch
from torch import Tensor

from moe import laps as timing
from moe.laps import Laps
from moe.model import build_model
from spec.events import PARTS, PASSES
from spec.model import Model

SPEC = Model.model_validate(
    {
        "n_layers": 2,
        "d_model": 16,
        "d_ff": 24,
        "vocab_size": 40,
        "mtp_depth": 1,
        "attention": {"kind": "gqa", "n_heads": 2, "n_kv_heads": 1},
        "moe": {"n_experts": 4, "top_k": 2, "d_expert": 8, "n_shared": 1, "first_k_dense": 1, "combine": "sigmoid_gate"},
    }
)
DENSE = ["attention", "other", "dense", "other"]
SPARSE = ["attention", "other", "router", "dispatch", "experts", "combine", "dense", "combine", "router", "other"]
MERGED = ["head", "other"]  # the model's head, then that of the extra prediction, whose block comes between
FORWARD = ["data", "other", *DENSE, *SPARSE, *MERGED, *SPARSE, *MERGED]


class Written(Laps):
    """Keeps what it was told."""

    def parts(self, backward: bool) -> list[str]:
        return [part for part, _ in groupby(part for part, is_backward, _ in self._marks if is_backward == backward)]


def step(laps: Laps | None, *, recompute: bool = False) -> list[Tensor]:
    """The loss and every gradient of one step from the same weights."""
    torch.manual_seed(0)
    model = build_model(SPEC, recompute=recompute)
    tokens = torch.randint(0, 40, (2, 13))
    if laps is not None:
        laps.mark("other")
    output = model(tokens[:, :-1], tokens[:, 1:], laps=laps)
    loss = output.lm_loss + output.balance_loss + output.mtp_loss
    if laps is not None:
        laps.in_backward = True
        laps.mark("other")
    loss.backward()
    return [loss.detach(), *(parameter.grad for parameter in model.parameters())]


@pytest.mark.parametrize("recompute", [False, True])
def test_a_clock_changes_no_bit(recompute: bool) -> None:
    for plain, timed in zip(step(None, recompute=recompute), step(Laps(torch.device("cpu")), recompute=recompute), strict=True):
        assert torch.equal(plain, timed)


def test_the_backward_pass_goes_through_the_parts_in_reverse() -> None:
    laps = Written(torch.device("cpu"))
    step(laps)
    assert laps.parts(backward=False) == FORWARD
    assert laps.parts(backward=True) == FORWARD[:0:-1]


def test_what_is_recomputed_is_time_of_the_backward_pass() -> None:
    laps, kept = Written(torch.device("cpu")), Written(torch.device("cpu"))
    step(kept)
    step(laps, recompute=True)
    assert laps.parts(backward=False) == FORWARD
    again = [part for part in laps.parts(backward=True) if part == "experts"]
    assert len(again) == 2 * len([part for part in kept.parts(backward=True) if part == "experts"])


def test_parts_sum_to_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(2.0**i for i in range(100))  # every stretch between two marks has a length of its own
    monkeypatch.setattr(timing, "stamp", lambda *, cuda: next(clock))
    laps = Laps(torch.device("cpu"))  # 1
    laps.mark("router")  # 2
    laps.mark("experts")  # 4
    laps.in_backward = True
    laps.mark("router")  # 8
    laps.mark("optimizer")  # 16: of no pass
    laps.mark("other")  # 32
    spent = laps.milliseconds()
    wanted = {("data", "forward"): 1, ("router", "forward"): 2, ("experts", "forward"): 4, ("router", "backward"): 8, ("optimizer", "forward"): 16}
    assert {(part, which): spent[i, j] for i, part in enumerate(PARTS) for j, which in enumerate(PASSES) if spent[i, j]} == {
        name: 1000.0 * seconds for name, seconds in wanted.items()
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_device_marks_are_events_that_nobody_waits_for() -> None:
    device = torch.device("cuda")
    x = torch.randn(2048, 2048, device=device)
    (x @ x).sum().item()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.set_sync_debug_mode("error")
    try:
        begin.record()
        laps = Laps(device)
        for part in ("router", "experts", "other"):
            for _ in range(20):
                x = x @ x / 2048
            laps.mark(part)
        end.record()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    spent = laps.milliseconds()
    assert spent.sum() == pytest.approx(begin.elapsed_time(end), rel=0.05)
    assert (spent[[PARTS.index("data"), PARTS.index("router"), PARTS.index("experts")], 0] > 0).all()
