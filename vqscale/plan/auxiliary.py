"""What training needs beside the tokenizer: LPIPS, a discriminator, the map of an alignment, frozen vision models, the
average of the weights. Meta device.

The part of plan/tokenizer.py for what a config may leave out. Memory is counted at the worst moment of each: the
discriminator's own step keeps the graphs of its answers to images and to reconstructions, LPIPS keeps what the gradient
to the reconstructions needs. The tokenizer's own graph waits for both.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from vqscale.engine.optimisers import muon_matrices
from vqscale.engine.rounded import num_rounded
from vqscale.nets import discriminators
from vqscale.nets.lpips import LPIPS
from vqscale.nets.vision import Vision
from vqscale.plan.activations import activation_bytes
from vqscale.plan.cost import averaged, split_bytes
from vqscale.plan.traffic import network_bytes
from vqscale.train.alignment import to_features
from vqscale.train.config import TokenizerRun


@dataclass
class Auxiliary:
    """Lines for the tables of a plan; empty for what the run does without."""

    parameters: dict[str, int] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    sent: dict[str, int] = field(default_factory=dict)


def auxiliary(config: TokenizerRun, images: int, world: int, dense: int, rows: int, dim: int) -> Auxiliary:
    """The costs for `images` per rank and micro-batch, of a tokenizer with `dense` parameters, `rows` numbers in the
    learned rows of a rank, and codes of `dim`."""
    found = Auxiliary()
    stage = config.engine.zero_stage if config.engine.name == "deepspeed" else 0
    with torch.device("meta"):
        samples = torch.empty(images, config.tokenizer.net.in_channels, *config.data.train.sides)
        if config.loss.adversarial is not None:
            net = discriminators.build(config.loss.adversarial.net)  # alone: nothing is sent here
            params = _count(net.parameters())
            found.parameters["discriminator"] = params
            muon = muon_matrices(net, config.loss.adversarial.optim or config.optim)
            found.memory["discriminator"] = split_bytes(params, stage, world, _count(muon))
            found.memory[f"activations of the discriminator, {images} images twice"] = 2 * activation_bytes(
                net, samples
            )
            found.sent["data axis and ZeRO: gradients, parameters of the discriminator"] = network_bytes(
                params, num_rounded(net, config.engine), config.engine, world
            )
        if config.loss.perceptual is not None:
            lpips = LPIPS()
            found.parameters["LPIPS (frozen)"] = _count(lpips.parameters())
            found.memory["LPIPS"] = 4 * _count(lpips.parameters())
            recon = torch.empty_like(samples).requires_grad_()
            found.memory[f"activations of LPIPS, {images} images"] = activation_bytes(lpips, samples, recon)
        _vision(config, dim, stage, world, found)
    if config.engine.precision == "bf16":
        found.memory = {name: x // 2 if name.startswith("activations") else x for name, x in found.memory.items()}
    if config.average.decay:
        found.memory["average of the weights"] = 4 * (averaged(config.engine, dense, world) + rows)
    return found


def _vision(config: TokenizerRun, dim: int, stage: int, world: int, found: Auxiliary) -> None:
    """Add what alignment learns, and the frozen vision models of alignment and discriminator."""
    alignment = config.loss.alignment
    if alignment is not None:
        net = to_features(alignment, dim)
        params = _count(net.parameters())
        found.parameters["map of alignment"] = params
        found.memory["map of alignment"] = split_bytes(params, stage, world, 0)
        found.sent["data axis and ZeRO: gradients, parameters of the map of alignment"] = network_bytes(
            params, num_rounded(net, config.engine), config.engine, world
        )
    holders = {"alignment": alignment, "discriminator": getattr(config.loss.adversarial, "net", None)}
    for name, holder in holders.items():
        if seen := getattr(holder, "vision", None):
            params = _count(Vision(seen).parameters())
            found.parameters[f"vision model of {name} (frozen)"] = params
            found.memory[f"vision model of {name}"] = 4 * params


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
