"""Experts spread over ranks give what they give in one process, and so do their gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kernels import experts_naive
from moe.parallel import Mesh, expert_ffn
from moe.train import sharded
from tests.kernels.routing import KINDS, choose
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


def every_kind(data: int, expert: int) -> dict[str, dict[str, Tensor]]:
    """One rank's share of each kind of routing."""
    mesh = Mesh.of(data, expert)
    return {kind: spread(mesh, kind) for kind in KINDS}


def spread(mesh: Mesh, kind: str) -> dict[str, Tensor]:
    """One rank's share: its output and gradients, and the gradients of the experts that it holds."""
    w_in, w_out = (w.detach()[mesh.held(E)].clone().requires_grad_() for w in weights())
    x, chosen, gate, slope = given(mesh.rank, kind)
    y, sent, _ = expert_ffn(x, chosen, gate, E, mesh, lambda rows, own, ones: experts_naive.expert_ffn(rows, w_in, w_out, own, ones, "swiglu"))
    (y * slope).sum().backward()
    assert sent is not None
    assert x.grad is not None and gate.grad is not None and w_in.grad is not None and w_out.grad is not None
    return {"y": y.detach(), "sent": sent, "x": x.grad, "gate": gate.grad, "w_in": w_in.grad, "w_out": w_out.grad}


@pytest.mark.parametrize(("data", "expert"), [(1, 2), (2, 2)])
def test_spread_experts_are_the_experts_of_one_process(tmp_path: Path, data: int, expert: int) -> None:
    ranks = on_ranks(data * expert, tmp_path, every_kind, data, expert)
    for kind in KINDS:
        check([rank[kind] for rank in ranks], data, expert, kind)


def check(got: list[dict[str, Tensor]], data: int, expert: int, kind: str) -> None:
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


def frozen(trained: list[str]) -> dict[str, Tensor]:
    """The mean gradients and their norm on one of two ranks that share the experts, where only `trained` is."""
    mesh = Mesh.of(1, 2)
    parameters = {name: nn.Parameter(torch.zeros(2)) for name in trained}
    for parameter in parameters.values():
        parameter.grad = torch.full((2,), float(mesh.rank + 1))
    sharded.average_gradients(parameters, 2, mesh)
    norm = sharded.total_norm(parameters, mesh)
    return {"norm": norm, **{name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}}


@pytest.mark.parametrize(
    ("trained", "means"),
    [
        (["blocks.0.ffn.experts.w_in"], [[0.5], [1.0]]),  # only_moe, where hash tables choose: nothing but experts
        (["blocks.0.ffn.router.weight"], [[1.5], [1.5]]),  # only_router: no expert
        (["blocks.0.ffn.experts.w_in", "blocks.0.ffn.router.weight"], [[0.5, 1.5], [1.0, 1.5]]),
    ],
)
def test_gradients_are_averaged_where_a_side_is_frozen(tmp_path: Path, trained: list[str], means: list[list[float]]) -> None:
    squares = [2 * mean**2 for rank in (0, 1) for name, mean in zip(trained, means[rank], strict=True) if rank == 0 or "experts" in name]
    for got, wanted in zip(on_ranks(2, tmp_path, frozen, trained), means, strict=True):
        assert got["norm"].item() == pytest.approx(sum(squares) ** 0.5)
        assert [got[name].tolist() for name in trained] == [[mean, mean] for mean in wanted]
