"""Experts spread over ranks give what they give in one process, and so do their gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import experts_naive
from moe.parallel import Mesh, expert_ffn
from tests.kernels.routing import choose
from tests.moe.parallel.ranks import on_ranks

T, K, E, D, F = 24, 2, 8, 6, 5  # tokens of one rank


def given(rank: int, kind: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(rank)
    return (
        torch.randn(T, D, dtype=torch.float64).requires_grad_(),
        choose(kind, T, K, E),
        torch.rand(T, K, dtype=torch.float64).requires_grad_(),
        torch.randn(T, D, dtype=torch.float64),
    )


def weights() -> tuple[Tensor, Tensor]:
    torch.manual_seed(99)
    return torch.randn(E, 2 * F, D, dtype=torch.float64).requires_grad_(), torch.randn(E, D, F, dtype=torch.float64).requires_grad_()


def spread(data: int, expert: int, kind: str) -> dict[str, Tensor]:
    """One rank's share: its output and gradients, and the gradients of the experts that it holds."""
    mesh = Mesh.of(data, expert)
    w_in, w_out = (w.detach()[mesh.held(E)].clone().requires_grad_() for w in weights())
    x, chosen, gate, slope = given(mesh.rank, kind)
    y, sent = expert_ffn(x, chosen, gate, E, mesh, lambda rows, own, ones: experts_naive.expert_ffn(rows, w_in, w_out, own, ones, "swiglu"))
    (y * slope).sum().backward()
    assert x.grad is not None and gate.grad is not None and w_in.grad is not None and w_out.grad is not None
    return {"y": y.detach(), "sent": sent, "x": x.grad, "gate": gate.grad, "w_in": w_in.grad, "w_out": w_out.grad}


@pytest.mark.parametrize("kind", ["spread", "all to one", "dropped"])
@pytest.mark.parametrize(("data", "expert"), [(1, 2), (2, 2)])
def test_spread_experts_are_the_experts_of_one_process(tmp_path: Path, data: int, expert: int, kind: str) -> None:
    got = on_ranks(data * expert, tmp_path, spread, data, expert, kind)
    w_in, w_out = weights()
    size = E // expert
    for rank, mine in enumerate(got):
        x, chosen, gate, slope = given(rank, kind)
        y = experts_naive.expert_ffn(x, w_in, w_out, chosen, gate, "swiglu")
        (y * slope).sum().backward()
        torch.testing.assert_close(mine["y"], y)
        torch.testing.assert_close(mine["x"], x.grad)
        torch.testing.assert_close(mine["gate"], gate.grad)
        kept = chosen[chosen < E]
        assert mine["sent"].tolist() == [int((kept // size == shard).sum()) for shard in range(expert)]
    # an expert's gradient: over the ranks that share the experts it is whole, over its replicas it is to be summed
    for name, whole in (("w_in", w_in.grad), ("w_out", w_out.grad)):
        assert whole is not None
        for shard in range(expert):
            held = sum(got[replica * expert + shard][name] for replica in range(data))
            torch.testing.assert_close(held, whole[shard * size : (shard + 1) * size])
