"""A second prior in one file, as one is added: a bag of ids, which is sampled in steps of its own."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import nn

from vqscale import priors
from vqscale.codes import noise
from vqscale.nets.config.transformer import TransformerConfig
from vqscale.priors.config import IdsConfig, SampleConfig

LINE = {"bag": f"{__name__}:BagConfig"}  # of PRIORS


@dataclass(frozen=True)
class BagSampleConfig(SampleConfig):
    """All ids are drawn in every step, and a share of them kept."""

    rounds: int = 2
    """passes over the image"""
    choice_temperature: float = 0.0
    """noise in which ids are kept; 0 keeps them in their order"""
    direction: Literal["forward", "backward"] = "forward"
    """where the order begins"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.rounds < 1:
            yield "rounds", f"rounds is {self.rounds}: use at least 1"


@dataclass(frozen=True)
class BagConfig(IdsConfig):
    """A bag of ids."""

    module: ClassVar[str] = f"{__name__}:Bag"
    sampling: ClassVar[type[SampleConfig]] = BagSampleConfig
    name: Literal["bag"] = "bag"
    """which prior"""
    net: TransformerConfig = field(default_factory=TransformerConfig)
    """of which it takes the width"""


class Bag(priors.Prior):
    """Every id follows from the class and the mean of some ids; in training the keys say of which."""

    def __init__(self, config, mesh=None, *, seed=0):
        super().__init__(config, config.net, mesh, seed)
        self.mix = nn.Linear(config.net.width, config.net.width)
        if not torch.empty(0).is_meta:
            self.to(self.mesh.device)

    def states(self, prefix_BPD, x_BTD):
        return self.mix(x_BTD.mean(1) + prefix_BPD[:, 0])[:, None].expand(x_BTD.shape)

    def loss(self, ids, condition, keys_B=None):
        seen_BT = noise.uniform(keys_B, 1, 1 + self.config.num_tokens) < 0.5
        x_BTD = self.head.embed(self.checked(ids).flatten(1)) * seen_BT[..., None]
        return self.modelled(self.states(self.prefix(condition, keys_B), x_BTD), ids)

    def draw(self, condition, settings, numbers_B, seed):
        prefix_BPD, num, count = self.prefix(condition), len(numbers_B), self.config.num_tokens
        ids_BT = torch.full((num, count), -1)
        places_T = torch.arange(count) if settings.direction == "forward" else torch.arange(count).flip(0)
        for step in range(settings.rounds):
            h_BTD = self.states(prefix_BPD, self.head.embed(ids_BT))
            keys_N = noise.keys(seed + step, numbers_B[:, None], torch.arange(count)).flatten()
            new_BT = self.head.sample(h_BTD.flatten(0, 1), keys_N).view(num, count)
            score_BT = settings.choice_temperature * noise.gumbel(noise.keys(step, numbers_B), 0, count) - places_T
            kept = -(-count * (step + 1) // settings.rounds)
            ids_BT = torch.full_like(ids_BT, -1).scatter(1, score_BT.topk(kept).indices, new_BT)
        return ids_BT.view(num, *self.config.grid)


def register(rank=0):
    """What the line in PRIORS does, in a process of its own."""
    priors.PRIORS.update(LINE)
