"""Experts spread over ranks give what they give in one process, and so do their gradients."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
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
    """One rank's share of each kind of routing, and of gradients that are averaged in small buckets."""
    mesh = Mesh.of(data, expert)
    return {kind: spread(mesh, kind) for kind in KINDS} | {"buckets": in_buckets(data * expert, mesh)}


SHAPES = {
    "a": (3,),
    "b": (2, 2),
    "c": (),
    "d": (50,),
    "blocks.0.ffn.experts.w_in": (2, 4),
    "e": (5, 1),
    "blocks.0.ffn.experts.w_out": (3,),
    "f": (1,),
}
BUCKET_BYTES = 64  # of float64: 8 numbers


def gradient(name: str, rank: int) -> Tensor | None:
    """Of one rank; some ranks have none of some."""
    generator = torch.Generator().manual_seed(1000 * rank + len(name) + ord(name[-1]))
    return None if (name, rank) in (("b", 1), ("f", 0)) else torch.randn(SHAPES[name], dtype=torch.float64, generator=generator)


def in_buckets(size: int, mesh: Mesh | None) -> dict[str, Tensor]:
    """The mean gradients, and in `sent` the numbers in each buffer that was reduced."""
    rank = mesh.rank if mesh else 0
    parameters = {name: nn.Parameter(torch.zeros(shape, dtype=torch.float64)) for name, shape in SHAPES.items()}
    for name, parameter in parameters.items():
        parameter.grad = gradient(name, rank)
    with patch.object(sharded, "BUCKET_BYTES", BUCKET_BYTES), patch.object(dist, "all_reduce", wraps=dist.all_reduce) as reduce:
        sharded.average_gradients(parameters, size, mesh)
    sent = torch.tensor([call.args[0].numel() for call in reduce.call_args_list], dtype=torch.int64)
    return {"sent": sent, **{name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}}


def check_buckets(got: list[dict[str, Tensor]], data: int, expert: int) -> None:
    for name, shape in SHAPES.items():
        for rank, mine in enumerate(got):
            theirs = [other for other in range(data * expert) if "experts" not in name or other % expert == rank % expert]
            total = torch.zeros(shape, dtype=torch.float64)
            for other in theirs:
                part = gradient(name, other)
                total = total if part is None else total + part
            torch.testing.assert_close(mine[name], total / (data * expert), rtol=1e-14, atol=1e-14)
    for mine in got:
        assert mine["sent"].tolist() == ([8, 3] if data > 1 else []) + [8, 50, 6], "experts' over their replicas; then a, b, c; d alone; e, f"


def test_gradients_of_one_rank_are_its_own() -> None:
    mine = in_buckets(1, None)
    assert mine.pop("sent").tolist() == []
    assert mine.keys() == SHAPES.keys() - {"f"}
    assert all(torch.equal(mean, gradient(name, 0)) for name, mean in mine.items())  # type: ignore[arg-type]


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
    check_buckets([rank["buckets"] for rank in ranks], data, expert)


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


SIDES = [  # what is trained, and the mean gradients of it on either rank
    (["blocks.0.ffn.experts.w_in"], [[0.5], [1.0]]),  # only_moe, where hash tables choose: nothing but experts
    (["blocks.0.ffn.router.weight"], [[1.5], [1.5]]),  # only_router: no expert
    (["blocks.0.ffn.experts.w_in", "blocks.0.ffn.router.weight"], [[0.5, 1.5], [1.0, 1.5]]),
]


def frozen() -> list[dict[str, Tensor]]:
    """The mean gradients and their norm on one of two ranks that share the experts, where only one of SIDES is trained."""
    mesh, found = Mesh.of(1, 2), []
    for trained, _ in SIDES:
        parameters = {name: nn.Parameter(torch.zeros(2)) for name in trained}
        for parameter in parameters.values():
            parameter.grad = torch.full((2,), float(mesh.rank + 1))
        sharded.average_gradients(parameters, 2, mesh)
        norm = sharded.total_norm(parameters, mesh)
        found.append({"norm": norm, **{name: parameter.grad for name, parameter in parameters.items() if parameter.grad is not None}})
    return found


def test_gradients_are_averaged_where_a_side_is_frozen(tmp_path: Path) -> None:
    ranks = on_ranks(2, tmp_path, frozen)
    for number, (trained, means) in enumerate(SIDES):
        squares = [2 * mean**2 for rank in (0, 1) for name, mean in zip(trained, means[rank], strict=True) if rank == 0 or "experts" in name]
        for mine, wanted in zip(ranks, means, strict=True):
            got = mine[number]
            assert got["norm"].item() == pytest.approx(sum(squares) ** 0.5)
            assert [got[name].tolist() for name in trained] == [[mean, mean] for mean in wanted]
