"""What a run would cost, without running it: the model on the meta device, arithmetic for the rest. No process group.

`plan` is what --dry-run prints, of one grid; `workload` is a run as the cost model (cost.py) sees it, for any grid.

Memory is parameters, gradients and Adam's two moments as the ZeRO stage splits them, the rows of one rank, the
activations that autograd keeps for one micro-batch (counted by building the graph on meta tensors), and the blocks of
the scan. Not counted: the allocator's overhead, workspaces of convolutions, the communication library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cache

import torch
from torch import nn

from vqscale import nets
from vqscale.codes.codebook import Codebook
from vqscale.codes.rows import Table, set_aside
from vqscale.config import to_dict
from vqscale.engine.optimisers import muon_matrices
from vqscale.engine.rounded import num_rounded
from vqscale.nets.config import NetConfig, example, grid
from vqscale.parallel.mesh import Axis, Mesh
from vqscale.plan.activations import activation_bytes
from vqscale.plan.auxiliary import auxiliary
from vqscale.plan.cost import split_bytes
from vqscale.plan.count import CodeAxis, Network, code_axis, network
from vqscale.plan.operations import in_training, of_tokenizer
from vqscale.plan.traffic import KNOWN, Grid, Work, engine_terms, messages, network_bytes, revival, sent
from vqscale.quantizers.config.tables import EMAConfig, IBQConfig, VQConfig
from vqscale.tokenizer.model import Tokenizer
from vqscale.train.config import TokenizerRun
from vqscale.train.frozen import freeze

MIB = 2**20


def planned_mesh(data: int, codes: int) -> Mesh:
    """The mesh of rank 0 of data x codes processes that nobody started: shapes only."""
    mesh = Mesh(device="meta")
    mesh.data, mesh.codes = Axis("data", data), Axis("codes", codes)
    mesh.world = Axis("world", data * codes)
    return mesh


@dataclass(frozen=True)
class Costs:
    """What a run costs on each of its ranks; bytes unless said otherwise."""

    head: str
    parameters: dict[str, int]
    memory: dict[str, int]
    sent: dict[str, int]
    operations: dict[str, int] = field(default_factory=dict)
    """of products, for one image"""

    def text(self) -> str:
        return "\n".join(
            [
                self.head,
                *_table("parameters", {name: f"{n:,}" for name, n in _with_sum(self.parameters).items()}),
                *_table("memory per rank (fp32 state)", _mib(self.memory)),
                *_table("bytes sent per rank and step", _mib(self.sent)),
                *(_table("GFLOP per image", flops) if (flops := _gflop(self.operations)) else []),
                *self.warnings(),
            ]
        )

    @property
    def training(self) -> int:
        """Operations for one image in training."""
        return in_training(self.operations)

    def warnings(self) -> list[str]:
        """Where a step sends more tokens on the code axis than gradients and parameters of the network."""
        tokens = sum(n for name, n in self.sent.items() if "code axis" in name)
        network = sum(n for name, n in self.sent.items() if "code axis" not in name and "rows" not in name)
        if tokens <= network or not network:
            return []
        return [
            f"warning: the code axis sends {tokens / MIB:,.1f} MiB of tokens a step and rank, more than the network's "
            f"{network / MIB:,.1f} MiB: it grows with the processes that share a codebook; give fewer (mesh.codes), "
            "those of one machine, if their rows fit"
        ]


def plan(config: TokenizerRun, world: int) -> Costs:
    """The costs of a run on `world` processes."""
    data, codes = config.mesh.planned(world)
    mesh = planned_mesh(data, codes)
    with torch.device("meta"):
        tokenizer = Tokenizer.from_config(config.tokenizer, mesh, config.run.seed)
    freeze(config, tokenizer)
    tables = set_aside(tokenizer)
    images = config.data.batch // world // config.engine.accumulation
    places, dim = grid(config.tokenizer.net, config.data.train.sides), tokenizer.quantizer.dim
    tokens = images * math.prod(places)
    parameters = {name: _parameters(part) for name, part in tokenizer.named_children()}
    dense, still = sum(parameters.values()), frozen_numbers(tokenizer)
    parameters["codebook"] = sum(t.num_codes * t.dim for t in tables.values() if isinstance(t, Codebook))
    stage = config.engine.zero_stage if config.engine.name == "deepspeed" else 0
    low = num_rounded(tokenizer, config.engine)
    step = replace(work(config, images, tokens, dim, dense - still), muon=_muon(tokenizer, config), rounded=low)
    others = auxiliary(config, images, world, dense, _learned(tables), dim)
    return Costs(
        f"{config.task} {config.run.folder}: {config.run.steps} steps of {config.data.batch} images, "
        f"data {data} x codes {codes} = {world} processes, {tokens} tokens per rank and micro-batch",
        parameters | others.parameters,
        {
            f"encoder, decoder ({_engine(config)})": split_bytes(dense, stage, world, step.muon, still),
            "rows, their gradients and moments": _rows_bytes(tables),
            f"activations of {images} images": _activations(tokenizer, images, config),
            "blocks of the scan": getattr(config.tokenizer.quantizer, "scan_mib", 0) * MIB,
            **others.memory,
        },
        _sent(step, config, Grid(data, codes), _learned(tables), parameters["codebook"] > 0) | others.sent,
        of_tokenizer(config),
    )


def work(config: TokenizerRun, images: int, tokens: int, dim: int, parameters: int) -> Work:
    """A step of a run in the terms of the cost model, without memory beside what the grid decides."""
    quantizer, engine = config.tokenizer.quantizer, config.engine
    return Work(
        codes=getattr(quantizer, "num_codes", 1),
        dim=dim,
        tokens=tokens,
        quantizer=quantizer.name,
        entropy=bool(getattr(quantizer, "entropy_weight", 0)),
        parameters=parameters,
        **engine_terms(engine),
        scan_mib=getattr(quantizer, "scan_mib", 0),
        revive_every=getattr(quantizer, "revive_every", 0),
        revive_most=getattr(quantizer, "revive_most", None),
        images=images,
        precision=engine.precision,
        codes_precision=engine.matmul,
        entropy_temperature=getattr(quantizer, "entropy_temperature", 0.01),
    )


def _muon(tokenizer: Tokenizer, config: TokenizerRun) -> int:
    """Numbers of the network in matrices that Muon steps."""
    return sum(p.numel() for part in tokenizer.children() for p in muon_matrices(part, config.optim))


def workload(config: TokenizerRun, images: int) -> tuple[Work, Network, CodeAxis]:
    """(a step with `images` per rank and micro-batch, its network, its code axis) of a run with one learned table."""
    quantizer, net = config.tokenizer.quantizer, config.tokenizer.net
    if not isinstance(quantizer, VQConfig | EMAConfig | IBQConfig):
        raise ValueError(
            f"the cost model knows the quantizers {', '.join(KNOWN)}, and tokenizer.quantizer.name is "
            f"{quantizer.name}: give one of these, or use `vqscale train --dry-run` for what it costs on one grid"
        )
    found = network(net, config.data.train.sides, quantizer.dim, config.loss)
    with torch.device("meta"):
        tokenizer = Tokenizer.from_config(config.tokenizer, planned_mesh(1, 1), config.run.seed)
    kept = _activations(tokenizer, 1, config)
    set_aside(tokenizer)
    tokens = images * found.tokens
    axis = code_axis(to_dict(quantizer))
    others = auxiliary(config, 1, 1, found.parameters, 0, quantizer.dim).memory
    graphs = sum(nbytes for name, nbytes in others.items() if name.startswith("activations"))
    step = replace(
        work(config, images, tokens, quantizer.dim, found.parameters),
        activations=kept + graphs,
        beside=sum(others.values()) - graphs,
        averaged=config.average.decay > 0,
        muon=_muon(tokenizer, config),
        rounded=num_rounded(tokenizer, config.engine),
    )
    return step, found, axis


def _sent(step: Work, config: TokenizerRun, grid: Grid, learned: int, table: bool) -> dict[str, int]:
    if step.quantizer in KNOWN:
        found = sent([*messages(step, grid), *revival(step, grid)], grid)
    else:
        # Without a table an id (8 bytes), and log-odds with their gradient if there are entropies; with one, roughly.
        numbers = 6 * step.dim + 10 if table else 2 + (2 * step.dim if step.entropy else 0)
        found = {
            "world": network_bytes(step.parameters, step.rounded, config.engine, grid.world),
            "data": 2 * 4 * (grid.data - 1) * learned // grid.data,
            "codes": step.accumulation * 4 * step.tokens * numbers * (grid.codes - 1),
        }
    return {
        "data axis and ZeRO: gradients, parameters of encoder and decoder": found["world"],
        "data axis: gradients of rows": found["data"],
        "code axis: tokens (does not grow with K)": found["codes"],
    }


def _engine(config: TokenizerRun) -> str:
    return f"ZeRO {config.engine.zero_stage}" if config.engine.name == "deepspeed" else "plain torch"


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def frozen_numbers(module: nn.Module) -> int:
    """Numbers that stand still."""
    return sum(parameter.numel() for parameter in module.parameters() if not parameter.requires_grad)


def _learned(tables: dict[str, Table]) -> int:
    return sum(p.numel() for table in tables.values() for p in table.parameters() if p.requires_grad)


def _rows_bytes(tables: dict[str, Table]) -> int:
    """Rows and buffers once, and for what is learned a gradient and two moments."""
    held = sum(t.numel() * t.element_size() for table in tables.values() for t in table.state_dict().values())
    return held + 12 * _learned(tables)


def _activations(tokenizer: Tokenizer, images: int, config: TokenizerRun) -> int:
    kept = _kept(config.tokenizer.net, tokenizer.quantizer.dim, tuple(config.data.train.sides), images)
    return kept // 2 if config.engine.precision == "bf16" else kept


@cache
def _kept(net: NetConfig, dim: int, sides: tuple[int, ...], images: int) -> int:
    """Bytes that autograd keeps in both sides of a network; most runs of a study have the same one."""
    with torch.device("meta"):
        parts = nets.build(net, dim)
        samples, *context = (torch.empty(shape) for shape in example(net, sides, images))
        z_BDg = torch.empty(images, dim, *grid(net, sides))
    kept = activation_bytes(parts.encoder, samples, *context)
    return kept + activation_bytes(parts.decoder, parts.post_quant_conv(z_BDg).detach(), *context)


def _with_sum(values: dict[str, int]) -> dict[str, int]:
    return values | {"in all": sum(values.values())}


def _gflop(values: dict[str, int]) -> dict[str, str]:
    return {name: f"{value / 1e9:,.3f}" for name, value in values.items()}


def _mib(values: dict[str, int]) -> dict[str, str]:
    return {name: f"{value / MIB:,.1f} MiB" for name, value in _with_sum(values).items()}


def _table(title: str, rows: dict[str, str]) -> list[str]:
    wide, right = max(map(len, rows)), max(map(len, rows.values()))
    return [title, *(f"  {name:{wide}}  {value:>{right}}" for name, value in rows.items())]
