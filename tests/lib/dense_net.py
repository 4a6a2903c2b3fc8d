"""A small net with labels and a context, for tests of the signals that have them: it is registered by its line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from torch.nn import functional as F

from vqscale import nets
from vqscale.nets.config import NetSettings

LINE = {"patches": f"{__name__}:PatchesConfig"}  # for NETS


@dataclass(frozen=True)
class PatchesConfig(NetSettings):
    """One convolution of one-hot labels beside the context, and one back."""

    module: ClassVar[str] = f"{__name__}:build"
    takes_context: ClassVar[bool] = True
    name: Literal["patches"] = "patches"
    """which network"""
    labels: tuple[int, ...] = (256,)
    """classes of each channel"""
    patch: int = 4
    """pixels of a side per latent"""

    @property
    def in_channels(self):
        return len(self.labels)

    @property
    def strides(self):
        return (self.patch,) * 2

    @property
    def strides_from(self):
        return "patch of the net patches"


class Enter(nn.Module):
    def __init__(self, config, dim):
        super().__init__()
        self.labels = config.labels
        self.dense = nn.Conv2d(sum(config.labels) + 3, dim, config.patch, stride=config.patch)

    def forward(self, x, context):
        channels = [
            x[:, i : i + 1] if classes == 1 else _one_hot(x[:, i].long(), classes)
            for i, classes in enumerate(self.labels)
        ]
        return self.dense(torch.cat([*channels, context], 1))


def _one_hot(numbers, classes):
    return (numbers[:, None] == torch.arange(classes).view(-1, 1, 1)).float()


class Leave(nn.Module):
    def __init__(self, config, dim):
        super().__init__()
        self.dense = nn.Conv2d(dim + 3, sum(config.labels), 1)

    def forward(self, z, context):
        return self.dense(torch.cat([F.interpolate(z, size=context.shape[2:]), context], 1))


def build(config, dim):
    return nets.Parts(Enter(config, dim), nn.Identity(), nn.Identity(), Leave(config, dim), "dense.weight")
