"""What the tests of the engines share: a network, a training of it by an engine, and the same by plain torch.

The network has what makes engines differ: matrices, an embedding and vectors (three groups of weight decay), sizes
that do not divide, one parameter large enough for ZeRO-3 to take apart, one without a gradient, one that is frozen,
recomputed activations, running statistics, and rows that are split over the code axis. Every rank has its own data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from vqscale.engine.config import EngineConfig, LrFactor, OptimConfig
from vqscale.engine.engine import Engine
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh

K, DIM, STEPS = 12, 5, 5
# eps keeps Adam from blowing the rounding of near-zero gradients up to whole steps
OPTIM = {"lr": 1e-2, "eps": 1e-4, "schedule": "cosine", "warmup_steps": 2, "rows_lr_factor": 3.0}
FACTORS = (LrFactor("deep", 0.1), LrFactor("deep.bias", 2.0))
DECAYS = {"weight_decay": 0.1, "rows_weight_decay": 0.3, "final_weight_decay": 0.5}


@dataclass
class Out:
    """As a tokenizer's: DeepSpeed does not look inside."""

    z: torch.Tensor


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.kinds = nn.Embedding(4, 3)  # the last one never comes up
        self.wide = nn.Linear(3, 401)
        self.deep = nn.Linear(401, 255)  # 102255 elements: above ZeRO-3's threshold, and odd
        self.norm = nn.BatchNorm1d(255)
        self.last = nn.Linear(255, DIM)
        self.unused = nn.Parameter(torch.ones(7, 3))
        self.frozen = nn.Parameter(torch.full((3,), 0.5), requires_grad=False)
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        for p in self.parameters():
            if p.requires_grad and p is not self.unused:
                p.data = torch.randn(p.shape, generator=generator) * 0.1

    def forward(self, x):
        h = torch.relu(self.wide(x * self.frozen + self.kinds(torch.arange(len(x)) % 3)))
        h = checkpoint(lambda h: torch.tanh(self.deep(h)), h, use_reentrant=False)
        return Out(self.last(self.norm(h)))


def whole_rows():
    return torch.randn(K, DIM, generator=torch.Generator().manual_seed(6))


def batch(step, micro, rank):
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(1000 * step + 100 * micro + rank)) * (1 + rank)


def loss(z, rows):
    """Big enough for the clipping to act; every row gets a gradient."""
    z = z.to(rows.dtype)
    return 3 * ((z @ rows.T).square().mean() + (z - 1).square().mean())


def reference(world, accumulation=1, clip=0.5, steps=STEPS, skip=(), decays=DECAYS):
    """The same training on one process with plain torch in float64; returns (norm, lr, tensors) after each step."""
    net, rows = Net().double(), nn.Parameter(whole_rows().double())
    named = dict(net.named_parameters())
    learned = {n: p for n, p in named.items() if p.requires_grad}
    buffers = [{n: b.clone() for n, b in net.named_buffers()} for _ in range(world)]
    groups = [
        {"params": [p for n, p in learned.items() if p.ndim > 1 and n[:4] not in ("kind", "deep")]}
        | {"first": "weight_decay"},
        {"params": [learned["deep.weight"]], "first": "weight_decay", "factor": 0.1},
        {"params": [p for n, p in learned.items() if p.ndim == 1 and n != "deep.bias"]},
        {"params": [learned["deep.bias"]], "factor": 2.0},
        {"params": [learned["kinds.weight"]], "first": "rows_weight_decay"},
        {"params": [rows], "factor": 3.0, "first": "rows_weight_decay"},
    ]
    adam = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.0)
    history = []
    for step in range(steps):
        for p in [*learned.values(), rows]:
            p.grad = torch.zeros_like(p)
        for rank in range(world):
            for micro in range(accumulation):
                out = torch.func.functional_call(net, {**named, **buffers[rank]}, batch(step, micro, rank).double())
                (loss(out.z, rows) / accumulation / world).backward()
        norm = math.sqrt(sum(p.grad.double().square().sum().item() for p in [*learned.values(), rows]))
        warm = step - 2
        lr = 1e-2 * (step + 1) / 3 if warm < 0 else 1e-2 * (1 + math.cos(math.pi * warm / (STEPS - 3))) / 2
        for group in adam.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)
            first = decays.get(group.get("first"), 0.0)
            final = decays.get("final_weight_decay", first) if first else 0.0
            group["weight_decay"] = final + (first - final) * (1 + math.cos(math.pi * step / (STEPS - 1))) / 2
        if step not in skip:
            for p in [*learned.values(), rows]:
                p.grad *= min(1.0, clip / norm) if clip else 1.0
            adam.step()
        for name in buffers[0]:
            mean = sum(b[name].double() for b in buffers) / world
            for b in buffers:
                b[name] = mean.to(b[name].dtype, copy=True)
        state = {f"parameter/{n}": p.detach().clone() for n, p in named.items()}
        for key in ("exp_avg", "exp_avg_sq"):
            state |= {f"{key}/{n}": adam.state[p].get(key, torch.zeros_like(p)).clone() for n, p in learned.items()}
            state[f"rows {key}"] = adam.state[rows].get(key, torch.zeros_like(rows)).clone()
        state |= {f"buffer/{n}": b.clone() for n, b in buffers[0].items() if n != "table"}
        state["rows parameter"] = rows.detach().clone()
        history.append((norm, lr, state))
    return history


def make(
    mesh,
    name="torch",
    stage=0,
    accumulation=1,
    clip=0.5,
    precision="fp32",
    communication=None,
    max_skipped=3,
    dtype=torch.float32,
    decays=DECAYS,
):
    start, stop = K * mesh.codes.rank // mesh.codes.size, K * (mesh.codes.rank + 1) // mesh.codes.size
    config = EngineConfig(
        name=name,
        zero_stage=stage,
        accumulation=accumulation,
        clip_norm=clip,
        precision=precision,
        communication=communication,
        max_skipped=max_skipped,
    )
    rows = nn.Parameter(whole_rows()[start:stop].to(dtype, copy=True))
    net = Net().to(dtype)
    if mesh.world.rank:  # only rank 0's and the first replica's are to count
        rows.data += mesh.data.rank
        for p in net.parameters():
            p.data += 1
    return Engine(net, {"codes": rows}, config, OptimConfig(**OPTIM, lr_factors=FACTORS, **decays), mesh, STEPS)


def take_step(engine, step, accumulation=1, poison=False):
    for micro in range(accumulation):
        x = batch(step, micro, engine.mesh.world.rank).to(engine.rows["codes"].dtype)
        if poison and engine.mesh.world.rank == engine.mesh.world.size - 1:
            x[0, 0] = math.nan
        out = engine(x)
        rows = ops.gather(engine.rows["codes"], engine.mesh.codes)
        engine.backward(loss(out.z, rows))
        report = engine.step()
        assert report.boundary == (micro == accumulation - 1)
    assert all(p.grad is None for p in [*engine.module.parameters(), *engine.rows.values()])
    return report


def state(kept):
    """(tensors, rows, facts) of an engine, or of what is kept beside it: what all ranks hold of the tensors put
    together, rows of this rank. Collective."""
    held, rows, facts = kept.held()
    mine = {name: (each.flat.clone(), each.start, each.shape) for name, each in held.items()}
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    every = [None] * world
    torch.distributed.all_gather_object(every, mine) if world > 1 else every.__setitem__(0, mine)
    return {name: _whole([each[name] for each in every]) for name in mine}, _copies(rows), facts


def _whole(parts):
    out = torch.full((math.prod(parts[0][2]),), torch.nan).to(parts[0][0].dtype)
    for flat, start, _ in parts:
        out[start : start + len(flat)] = flat
    return out.view(parts[0][2])


def _copies(tensors):
    return {name: x.detach().clone() for name, x in tensors.items()}


@torch.no_grad()
def load(kept, tensors, rows, facts):
    """Continue from a `state`, of any number of ranks. Collective."""
    held, mine, _ = kept.held()
    assert (held.keys(), mine.keys()) == (tensors.keys(), rows.keys())
    for name, each in held.items():
        assert each.shape == tuple(tensors[name].shape)
        each.flat.copy_(tensors[name].reshape(-1)[each.start : each.start + len(each.flat)])
    for name, x in mine.items():
        x.copy_(rows[name])
    kept.loaded(facts)


def gathered(engine):
    """The state with rows put together, named as the reference names it."""
    replicated, rows, facts = state(engine)
    whole = {f"rows {n.split('/')[0]}": torch.cat(ops.gather_objects(t, engine.mesh.codes)) for n, t in rows.items()}
    return {**replicated, **whole}, facts


def train(data, codes, steps=STEPS, poison=(), **options):
    engine = make(Mesh(data, codes), **options)
    history = []
    for step in range(steps):
        report = take_step(engine, step, options.get("accumulation", 1), step in poison)
        assert report.stepped == (step not in poison)
        history.append((report.grad_norm, report.lr, gathered(engine)[0]))
    return history


def compare(got, expected, tolerance=1e-9):
    assert len(got) == len(expected)
    for step, ((norm, lr, state), (true_norm, true_lr, truth)) in enumerate(zip(got, expected, strict=True)):
        assert norm == pytest.approx(true_norm, rel=tolerance), step
        assert lr == pytest.approx(true_lr), step
        assert state.keys() == truth.keys()
        for name, tensor in truth.items():
            error = (state[name].double() - tensor.double()).abs().max().item()
            scale = tensor.abs().max().item()
            assert error <= tolerance * max(scale, 1e-3), f"step {step}: {name} is off by {error} of {scale}"


def train_on(data, codes, options):
    return train(data, codes, **options)


def poisoned(kinds):
    """The last rank has a batch that is not a number at step 1, and from step 3 on until the engine gives up."""
    out = []
    for options in kinds:
        engine = make(Mesh(1, 2), max_skipped=1, **options)
        history = []
        for step in range(STEPS):
            message = ""
            try:
                report = take_step(engine, step, options.get("accumulation", 1), poison=step in (1, 3, 4))
            except FloatingPointError as error:
                message = str(error)
            history.append((report.stepped, report.grad_norm, *gathered(engine), message))
        out.append(history)
    return out


def check_poisoned(history, tolerance):
    truth = reference(2, skip=(1, 3, 4))
    assert [stepped for stepped, *_ in history[:4]] == [True, False, True, False]
    for (_, _, state, _, _), (_, _, expected) in zip(history, truth, strict=True):
        for name, tensor in expected.items():
            assert state[name].isfinite().all(), name
            if not name.startswith("buffer/"):  # the reference has no remedy for its statistics
                torch.testing.assert_close(state[name].double(), tensor, rtol=tolerance, atol=tolerance)
    assert not math.isfinite(history[1][1])
    assert [facts for *_, facts, _ in history][-1] == {"boundaries": 5, "skipped": 3, "in_a_row": 2}
    assert [bool(message) for *_, message in history] == [False] * 4 + [True]
    assert "2 steps in a row had gradients that are not finite" in history[4][4]
    assert "engine.max_skipped allows 1: lower optim.lr" in history[4][4]


def largest_difference(one, other):
    assert one[2] == other[2]
    pairs = [(one[part][name], other[part][name]) for part in (0, 1) for name in one[part] | other[part]]
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)
