"""What a run would cost, without running it: the model on the meta device, arithmetic for the rest. No process group.

Memory is parameters, gradients and Adam's two moments as the ZeRO stage splits them, the rows of one rank, the
activations that autograd keeps for one micro-batch (counted by building the graph on meta tensors), and the blocks of
the scan. Not counted: the allocator's overhead, workspaces of convolutions, the communication library.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from vqscale.codes.codebook import Codebook
from vqscale.codes.rows import Table, set_aside
from vqscale.parallel.mesh import Axis, Mesh
from vqscale.tokenizer import Tokenizer
from vqscale.train.activations import activation_bytes
from vqscale.train.config import TokenizerRun
from vqscale.train.plan_judges import judges
from vqscale.train.tokenizer import build

MIB = 2**20


def planned_mesh(data: int, codes: int) -> Mesh:
    """The mesh of rank 0 of data x codes processes that nobody started: shapes only."""
    mesh = Mesh(device="meta")
    mesh.data, mesh.codes = Axis("data", data), Axis("codes", codes)
    mesh.world = Axis("world", data * codes)
    return mesh


def _split(params: int, stage: int, world: int) -> int:
    """Bytes of fp32 parameters, gradients and two moments on one rank at a ZeRO stage."""
    part = -(-params // world)
    moments = part if stage >= 1 else params
    gradients = part if stage >= 2 else params
    weights = part if stage >= 3 else params
    return 4 * (weights + gradients + 2 * moments)


@dataclass(frozen=True)
class Costs:
    """What a run costs on each of its ranks; bytes unless said otherwise."""

    head: str
    parameters: dict[str, int]
    memory: dict[str, int]
    sent: dict[str, int]

    def text(self) -> str:
        return "\n".join(
            [
                self.head,
                *_table("parameters", {name: f"{n:,}" for name, n in _with_sum(self.parameters).items()}),
                *_table("memory per rank (fp32 state)", _mib(self.memory)),
                *_table("bytes sent per rank and step", _mib(self.sent)),
            ]
        )


def plan(config: TokenizerRun, world: int) -> Costs:
    """The costs of a run on `world` processes."""
    data, codes = config.mesh.resolve(world)
    mesh = planned_mesh(data, codes)
    with torch.device("meta"):
        tokenizer = build(config.tokenizer, mesh, config.run.seed)
    tables = set_aside(tokenizer)
    images = config.data.batch // world // config.engine.accumulation
    side = config.data.train.image_size // config.tokenizer.net.stride
    tokens, dim = images * side * side, tokenizer.quantizer.dim
    parameters = {name: _parameters(part) for name, part in tokenizer.named_children()}
    dense = sum(parameters.values())
    parameters["codebook"] = sum(t.num_codes * t.dim for t in tables.values() if isinstance(t, Codebook))
    stage = config.engine.zero_stage if config.engine.name == "deepspeed" else 0
    others = judges(config, images, world, dense, _learned(tables))
    per_token = config.engine.accumulation * _sent_per_token(config, dim, parameters["codebook"] > 0)
    return Costs(
        f"{config.task} {config.run.folder}: {config.run.steps} steps of {config.data.batch} images, "
        f"data {data} x codes {codes} = {world} processes, {tokens} tokens per rank and micro-batch",
        parameters | others.parameters,
        {
            f"encoder, decoder ({_engine(config)})": _split(dense, stage, world),
            "rows, their gradients and moments": _rows_bytes(tables),
            f"activations of {images} images": _activations(tokenizer, images, side, config),
            "blocks of the scan": getattr(config.tokenizer.quantizer, "scan_mib", 0) * MIB,
            **others.memory,
        },
        {
            "data axis and ZeRO: gradients of encoder and decoder": 8 * dense * (world - 1) // world,
            "data axis: gradients of rows": 2 * 4 * (data - 1) * _learned(tables) // data,
            "code axis: tokens (does not grow with K)": 4 * tokens * per_token * (codes - 1),
            **others.sent,
        },
    )


def _sent_per_token(config: TokenizerRun, dim: int, table: bool) -> int:
    """Numbers of 4 bytes. Without a table an id (8 bytes), and log-odds with their gradient if there are entropies."""
    if table:
        return 6 * dim + 10
    return 2 + (2 * dim if getattr(config.tokenizer.quantizer, "entropy_weight", 0) else 0)


def _engine(config: TokenizerRun) -> str:
    return f"ZeRO {config.engine.zero_stage}" if config.engine.name == "deepspeed" else "plain torch"


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _learned(tables: dict[str, Table]) -> int:
    return sum(p.numel() for table in tables.values() for p in table.parameters() if p.requires_grad)


def _rows_bytes(tables: dict[str, Table]) -> int:
    """Rows and buffers once, and for what is learned a gradient and two moments."""
    held = sum(t.numel() * t.element_size() for table in tables.values() for t in table.state_dict().values())
    return held + 12 * _learned(tables)


def _activations(tokenizer: Tokenizer, images: int, side: int, config: TokenizerRun) -> int:
    net, size = config.tokenizer.net, config.data.train.image_size
    kept = activation_bytes(tokenizer.encoder, torch.empty(images, net.in_channels, size, size, device="meta"))
    kept += activation_bytes(tokenizer.decoder, torch.empty(images, net.z_channels, side, side, device="meta"))
    return kept // 2 if config.engine.precision == "bf16" else kept


def _with_sum(values: dict[str, int]) -> dict[str, int]:
    return values | {"in all": sum(values.values())}


def _mib(values: dict[str, int]) -> dict[str, str]:
    return {name: f"{value / MIB:,.1f} MiB" for name, value in _with_sum(values).items()}


def _table(title: str, rows: dict[str, str]) -> list[str]:
    wide, right = max(map(len, rows)), max(map(len, rows.values()))
    return [title, *(f"  {name:{wide}}  {value:>{right}}" for name, value in rows.items())]
