"""How many nats the ids of a tokenizer hold given each other: what a small prior, always the same one, has learnt of
them after a fixed number of steps, beside what the frequencies of ids alone say, and log K.

An autoregressive prior of 4 layers of 128 numbers (0.8 M parameters beside its table of ids), without classes, that
begins with what codes decode to, as the quickstart's does; its batches follow from a seed, so that tokenizers compare.
Not a prior to draw from: train/prior.py trains these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale import priors
from vqscale.codes.heads.config import FlatConfig
from vqscale.codes.rows import Rows, set_aside
from vqscale.data.order import permutation
from vqscale.data.tokens.stream import TokenBatch
from vqscale.engine.config import EngineConfig, OptimConfig
from vqscale.engine.engine import Engine
from vqscale.metrics import unigram
from vqscale.nets.config.transformer import TransformerConfig
from vqscale.parallel.mesh import Mesh
from vqscale.priors.base import Prior
from vqscale.priors.config.autoregressive import AutoregressiveConfig
from vqscale.quantizers.base import Quantizer
from vqscale.seed import derive
from vqscale.train import loop, prior

BATCH = 32
NET = TransformerConfig(
    width=128,
    num_layers=4,
    num_heads=4,
    ffn_multiple=64,
    qk_norm=True,
    dropout_token=0.0,
    dropout_residual=0.0,
    dropout_ffn=0.0,
)
ABOUT = f"autoregressive, {NET.num_layers} layers of {NET.width}, no classes, batches of {BATCH}, AdamW at 3e-3"


@dataclass(frozen=True)
class Known:
    """Ids of images in memory, the same on every rank, as an evaluation reads them."""

    ids: Tensor
    mesh: Mesh
    batch: int

    def batches(self) -> Iterator[TokenBatch]:
        """This rank's part of each batch; past the last image not valid."""
        world, mine = self.mesh.world, self.batch // self.mesh.world.size
        for first in range(0, len(self.ids), self.batch):
            numbers = first + world.rank * mine + torch.arange(mine)
            valid = numbers < len(self.ids)
            ids = self.ids[numbers.clamp(max=len(self.ids) - 1).to(self.ids.device)]
            unknown = torch.full((mine,), -1)
            yield TokenBatch(ids, unknown, [""] * mine, valid, torch.where(valid, numbers, -1), unknown)


def check(mesh: Mesh) -> None:
    """ValueError where a batch does not divide by the processes."""
    if BATCH % mesh.world.size:
        raise ValueError(
            f"the small prior learns in batches of {BATCH}, which do not divide by {mesh.world.size} processes "
            f"(--nproc_per_node): use a divisor of {BATCH}, or leave --training out"
        )


def entropies(
    quantizer: Quantizer,
    training: Tensor,
    held_out: Tensor,
    steps: int,
    mesh: Mesh,
    seed: int = 0,
    advance: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """Of a token of held-out ids, and of an image: nats under the small prior, by the frequencies of ids in training,
    and where all were alike. Ids are (I, *grid), those of all ranks on every rank. Collective; the same on any number
    of processes up to rounding. ValueError where a batch does not divide by them."""
    check(mesh)
    model = _trained(quantizer, training, steps, mesh, seed, advance)
    layout = Rows(quantizer.num_codes, mesh.codes.size, mesh.codes.rank)
    mine = torch.tensor_split(training, mesh.world.size)[mesh.world.rank]
    most = -(-len(training) // mesh.world.size)  # as many on every rank; -1 is nobody
    padded = torch.cat([mine, mine.new_full((most - len(mine), *mine.shape[1:]), -1)])
    seen_Ik = unigram.columns(padded, 1, layout, mesh)
    found = prior.evaluate(model, model, Known(held_out, mesh, BATCH), mesh, 0, seen_Ik, seed)
    tokens = held_out[0].numel()
    each = {"prior_nats": found["loss"], "unigram_nats": found["unigram"], "uniform_nats": found["uniform"]}
    return each | {f"{name}_image": tokens * nats for name, nats in each.items()}


def _trained(
    quantizer: Quantizer,
    training: Tensor,
    steps: int,
    mesh: Mesh,
    seed: int,
    advance: Callable[[int, float], None] | None,
) -> Prior:
    model = _built(quantizer, tuple(training.shape[1:]), mesh, seed)
    rows = loop.learned_rows(set_aside(model))
    optim = OptimConfig(
        lr=3e-3,
        betas=(0.9, 0.95),
        weight_decay=0.05,
        schedule="cosine",
        warmup_steps=min(50, steps - 1),
        final_factor=0.05,
    )
    engine = Engine(model.train(), rows, EngineConfig(name="torch"), optim, mesh, steps)
    world, mine = mesh.world, BATCH // mesh.world.size
    for step in range(steps):
        places = step * BATCH + world.rank * mine + torch.arange(mine)
        ids = training[_images(places, len(training), seed).to(training.device)]
        engine.backward(engine(ids, torch.full((mine,), -1, device=ids.device)).loss)
        engine.step()
        if advance is not None:
            advance(BATCH, 0.0)
    return model.eval()


def _images(places: Tensor, count: int, seed: int) -> Tensor:
    """The images at these places of the endless order: every epoch a permutation of all."""
    epochs, within = places // count, places % count
    orders = {epoch: permutation(count, derive("probe", seed, epoch)) for epoch in epochs.unique().tolist()}
    return torch.tensor([orders[epoch][at] for epoch, at in zip(epochs.tolist(), within.tolist(), strict=True)])


def _built(quantizer: Quantizer, grid: tuple[int, ...], mesh: Mesh, seed: int) -> Prior:
    config = AutoregressiveConfig(
        num_codes=quantizer.num_codes,
        grid=grid,
        num_classes=0,
        class_dropout=0.0,
        feature_dim=quantizer.dim,
        head=FlatConfig(embedding="codebook", output_scale=0.5),
        net=NET,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = priors.build(config, mesh, seed=derive("probe", seed))
        model.head.set_features(quantizer.decode)
    return model
