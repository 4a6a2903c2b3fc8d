"""The grid of ranks, the collectives and their gradients against plain mathematics, and spawn itself."""

from __future__ import annotations

import os
import random
import time

import numpy as np
import pytest
import torch

from vqscale.parallel import ops
from vqscale.parallel.background import on_first
from vqscale.parallel.config import MeshConfig
from vqscale.parallel.mesh import Mesh
from vqscale.parallel.spawn import RankError, run

WORLDS = [1, pytest.param(2, marks=pytest.mark.dist), pytest.param(4, marks=pytest.mark.dist)]


def _grid(data, codes):
    mesh = Mesh(data, codes)
    here = torch.tensor([mesh.world.rank])
    return (
        (mesh.data.rank, mesh.codes.rank, mesh.world.rank),
        ops.gather(here, mesh.codes).tolist(),
        ops.gather(here, mesh.data).tolist(),
    )


@pytest.mark.dist
@pytest.mark.parametrize(("data", "codes"), [(2, 2), (4, 1), (1, 4)])
def test_a_code_group_is_made_of_neighbours(ranks, data, codes):
    for rank, (place, group, replicas) in enumerate(ranks(4, _grid, data, codes)):
        assert place == (rank // codes, rank % codes, rank)
        assert group == [rank // codes * codes + c for c in range(codes)]
        assert replicas == [rank % codes + d * codes for d in range(data)]


def test_one_process_needs_nothing():
    mesh = Mesh()
    assert (mesh.data.size, mesh.codes.size, mesh.world.size) == (1, 1, 1)
    x = torch.ones(3, requires_grad=True)
    for op in (ops.gather, ops.scatter_sum, ops.sum_over, ops.share, ops.max_over, ops.broadcast):
        assert op(x, mesh.codes) is x


def test_a_mesh_that_does_not_fit_says_what_to_change():
    with pytest.raises(ValueError, match=r"data 2 x codes 4 = 8 processes, but 1 was started: change mesh.data"):
        Mesh(2, 4)
    with pytest.raises(ValueError, match="at least 1"):
        Mesh(0, 1)


def _collectives(world):
    """Values and gradients of every op; the loss is a weighted sum whose weights differ by rank and position."""
    mesh = Mesh(1, world)
    axis, rank = mesh.codes, mesh.codes.rank
    out = {}
    for name in ("gather", "scatter_sum", "sum_over", "share"):
        x = (torch.arange(8, dtype=torch.float64).reshape(4, 2) + 100 * rank).requires_grad_()
        y = getattr(ops, name)(x, axis)
        weight = torch.arange(y.numel(), dtype=torch.float64).reshape(y.shape) + 1000 * rank
        (y * weight).sum().backward()
        out[name] = (y.detach(), x.grad)
    out["max"] = ops.max_over(torch.tensor([rank, -rank]), axis)
    out["min"] = ops.min_over(torch.tensor([rank, -rank]), axis)
    out["broadcast"] = ops.broadcast(torch.tensor([rank]), axis, source=world - 1)
    out["objects"] = ops.gather_objects({"rank": rank}, axis)
    return out


@pytest.mark.parametrize("world", WORLDS)
def test_collectives_against_plain_mathematics(ranks, world):
    results = ranks(world, _collectives, world)
    base = torch.arange(8, dtype=torch.float64).reshape(4, 2)
    xs = [base + 100 * rank for rank in range(world)]

    def weight(shape, rank):
        return torch.arange(shape.numel(), dtype=torch.float64).reshape(shape) + 1000 * rank

    part = 4 // world
    for rank, got in enumerate(results):
        everything, total = torch.cat(xs), sum(xs)
        mine = slice(4 * rank, 4 * rank + 4)
        assert torch.equal(got["gather"][0], everything)
        assert torch.equal(got["gather"][1], sum(weight(everything.shape, r) for r in range(world))[mine])
        assert torch.equal(got["scatter_sum"][0], total[part * rank : part * rank + part])
        assert torch.equal(got["scatter_sum"][1], torch.cat([weight(torch.Size([part, 2]), r) for r in range(world)]))
        assert torch.equal(got["sum_over"][0], total)
        assert torch.equal(got["sum_over"][1], sum(weight(base.shape, r) for r in range(world)))
        assert torch.equal(got["share"][0], xs[rank])
        assert torch.equal(got["share"][1], sum(weight(base.shape, r) for r in range(world)))
        assert got["max"].tolist() == [world - 1, 0]
        assert got["min"].tolist() == [0, 1 - world]
        assert got["broadcast"].tolist() == [world - 1]
        assert got["objects"] == [{"rank": r} for r in range(world)]


def _bytes(world):
    mesh = Mesh(1, world)
    x = torch.zeros(8, 3, requires_grad=True)
    with ops.count_bytes() as sent:
        ops.gather(x, mesh.codes).sum().backward()
        ops.sum_over(x.detach(), mesh.codes)
    return dict(sent)


@pytest.mark.dist
def test_bytes_are_counted_as_a_ring_sends_them(ranks):
    part = 8 * 3 * 4
    # all-gather and its backward move (M - 1) parts each, the all-reduce 2 (M - 1) / M of the tensor
    assert ranks(4, _bytes, 4) == [{"codes": 3 * part + 3 * part + 2 * 3 * part // 4}] * 4


def _fail(which):
    mesh = Mesh(1, 2)
    if mesh.world.rank == which:
        raise KeyError("a reason of its own")
    ops.barrier(mesh.world)


@pytest.mark.dist
@pytest.mark.parametrize("which", [0, 1])
def test_the_first_exception_wins_and_the_pool_recovers(ranks, which):
    with pytest.raises(RankError, match=rf"rank {which} of 2 failed: KeyError: 'a reason of its own'"):
        ranks(2, _fail, which)
    assert len(ranks(2, _grid, 1, 2)) == 2


def _state():
    switches = (torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision())
    flags = (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.distributed.is_initialized())
    environment = {key: os.environ[key] for key in os.environ if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    drawn = (torch.rand(1).item(), np.random.rand(), random.random())
    return os.getpid(), (switches, flags, environment, os.getcwd(), drawn)


def _untidy():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(3)
    torch.set_float32_matmul_precision("medium")
    torch.set_grad_enabled(False)
    torch.use_deterministic_algorithms(True)
    os.environ["LEFT"] = "behind"
    os.chdir("/")
    return os.getpid()


def test_a_call_leaves_nothing_to_the_next_one_in_its_process(ranks):
    ((process, before),) = ranks(1, _state)
    assert ranks(1, _untidy) == [process]
    assert ranks(1, _state) == [(process, before)]


def _hang():
    if Mesh(1, 2).world.rank == 1:
        time.sleep(60)


@pytest.mark.slow
@pytest.mark.dist
def test_a_hang_is_an_error_that_names_the_rank():
    with pytest.raises(RankError, match=r"no answer from rank 1 of 2 within 5 s"):
        run(_hang, 2, timeout_s=5)


def test_the_processes_of_a_machine_share_a_codebook_unless_told(monkeypatch):
    assert MeshConfig().resolve(64, local=8) == (8, 8)
    assert MeshConfig().resolve(8, local=8) == (1, 8)
    assert MeshConfig().resolve(12, local=8) == (1, 12)  # machines that are not filled alike
    assert MeshConfig(data=2).resolve(64, local=8) == (2, 32)
    assert MeshConfig(codes=16).resolve(64, local=8) == (4, 16)
    assert (MeshConfig().planned(64), MeshConfig().planned(4)) == ((8, 8), (1, 4))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "64")
    assert MeshConfig().resolve(64) == MeshConfig().planned(64) == (16, 4)
    assert MeshConfig().planned(32) == (4, 8)  # others than those that were started


def _broadcast(rank_values):
    mesh = Mesh(1, 2)
    rank = mesh.world.rank
    tensors = [torch.full(shape, 10.0 * rank + i, dtype=dtype) for i, (shape, dtype) in enumerate(rank_values)]
    tensors[2] = tensors[2].t()  # not as it lies in memory
    calls, broadcast = [], torch.distributed.broadcast
    with pytest.MonkeyPatch.context() as patch, ops.count_bytes() as sent:
        patch.setattr(ops, "BUCKET_BYTES", 64)
        patch.setattr(torch.distributed, "broadcast", lambda x, **how: calls.append(x.nbytes) or broadcast(x, **how))
        ops.broadcast_(tensors, mesh.world)
    return [x.unique().tolist() for x in tensors], [tuple(x.shape) for x in tensors], calls, dict(sent)


@pytest.mark.dist
def test_many_tensors_are_broadcast_together(ranks):
    kinds = [((3,), torch.float32), ((2,), torch.int64), ((2, 3), torch.float32), ((), torch.float32)]
    kinds += [((100,), torch.float32), ((1,), torch.float32)]
    for rank, (values, shapes, calls, sent) in enumerate(ranks(2, _broadcast, kinds)):
        assert values == [[float(i)] for i in range(6)]
        assert shapes == [(3,), (2,), (3, 2), (), (100,), (1,)]
        assert calls == [
            12 + 24 + 4,
            400,
            4,
            16,
        ]  # floats to 64 bytes, one of more, the rest; an int64
        assert sent == ({"world": 460} if rank == 0 else {"world": 0})


def _on_first(path):
    mesh = Mesh(data=2)
    asked = on_first(lambda: [os.getpid(), mesh.world.rank], mesh)
    with pytest.raises(FileNotFoundError, match="nothing-there"):
        on_first(lambda: (path / "nothing-there").read_text(), mesh)
    with pytest.raises(ValueError, match="of rank 0"):
        on_first(lambda: int(f"of rank {mesh.world.rank}"), mesh)
    calls = []
    counted = ops.sum_over
    ops.sum_over = lambda *given: calls.append(1) or counted(*given)
    try:
        on_first(lambda: time.sleep(0.5), mesh)
    finally:
        ops.sum_over = counted
    return asked, len(calls)


@pytest.mark.dist
def test_what_the_first_rank_does_all_get_and_nobody_waits_in_one_collective_for_it(ranks, tmp_path):
    (first, calls), (second, others) = ranks(2, _on_first, tmp_path)
    assert first == second
    assert first[1] == 0
    assert calls == others > 3
    assert on_first(lambda: 3, Mesh()) == 3
