"""Small tokenizers for tests, and run folders that hold them as a training leaves them, without a training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch

from vqscale import config as configuration
from vqscale.codes.rows import set_aside
from vqscale.disk.held import shared
from vqscale.disk.writer import Writer
from vqscale.parallel.mesh import Mesh
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.tokenizer.export import entries
from vqscale.tokenizer.model import Tokenizer
from vqscale.train import loop
from vqscale.train.config import TokenizerRun

NET = {"channels": 8, "multipliers": [1, 2], "num_blocks": 1, "attention_levels": [], "num_groups": 4, "z_channels": 6}
IBQ = {"name": "ibq", "num_codes": 13, "dim": 4, "init": "normal"}


def small_config(quantizer=IBQ, net=NET, **settings) -> TokenizerConfig:
    return configuration.parse(TokenizerConfig, {"net": net, "quantizer": quantizer, **settings})


def small(mesh=None, seed=1, **settings) -> Tokenizer:
    """A tokenizer whose every parameter has values of its own, on any number of ranks the same."""
    tokenizer = Tokenizer.from_config(small_config(**settings), mesh, seed)
    shift(tokenizer, 0.01)
    return tokenizer.eval()


def shift(tokenizer, by) -> None:
    """Move every parameter by a constant, so that none has the value that it began with."""
    with torch.no_grad():
        for entry in entries(tokenizer).values():
            entry.tensor.add_(by)


def images(batch=2, side=8) -> torch.Tensor:
    return torch.rand(batch, 3, side, side, generator=torch.Generator().manual_seed(5)) * 2 - 1


def write_run(folder: Path, tokenizer: Tokenizer, mesh=None, steps=(7,), average=None, moments=1, **metrics) -> Path:
    """A run folder with checkpoints of `tokenizer`, and with averages that are `average` above its parameters.

    `moments` are so many numbers that only a training wants.
    """
    mesh = mesh or Mesh()
    run = configuration.parse(
        TokenizerRun,
        {"data": {"train": {"shards": "x.tar", "image_size": 8}}, "run": {"folder": str(folder)}}
        | {"tokenizer": configuration.to_dict(tokenizer.config)}
        | {"average": {"decay": 0.0 if average is None else 0.9}},
    )
    tables = set_aside(tokenizer)
    learned, others = loop.table_rows(tables, learned=True), loop.table_rows(tables, learned=False)
    dense = {name: p.detach() for name, p in tokenizer.named_parameters()}
    replicated = {f"parameter/{name}": p for name, p in dense.items()}
    replicated |= {f"exp_avg/{name}": p * 0 for name, p in dense.items()}
    replicated["exp_avg_sq/decoder.conv_out.weight"] = torch.ones(moments)
    replicated["discriminator/parameter/main.0.weight"] = torch.ones(3)
    replicated |= {f"buffer/{name}": x for name, x in tokenizer.state_dict().items() if name not in dense}
    replicated["buffer/quantizer.upkeep.steps"] = torch.ones(())
    rows = {f"parameter/{name}": x for name, x in learned.items()} | others
    rows |= {f"exp_avg/{name}": x * 0 for name, x in learned.items()}
    if average is not None:
        replicated |= {f"average/{name}": p + average for name, p in dense.items()}
        rows |= {f"average/{name}": x + average for name, x in learned.items()}
    for step in steps:
        writing = Writer(folder / "checkpoints", mesh, keep=9)
        writing.save(
            step,
            {name: shared(x) for name, x in replicated.items()},
            {name: (x.detach(), *loop._place(name, tables)) for name, x in rows.items()},
            {"done": asdict(loop.Done(step=step))},
        )
        writing.wait()
    if mesh.world.rank == 0:
        (folder / "run.yaml").write_text(configuration.dump(run))
        (folder / "code").mkdir(exist_ok=True)
        (folder / "code" / "commit.txt").write_text("abc123\n")
        (folder / "summary.json").write_text(json.dumps({"steps": steps[-1], "quantizer": "ibq", **metrics}))
    return folder
