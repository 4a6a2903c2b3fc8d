"""PatchGAN: a discriminator that gives every patch of an image a number, high where it takes it for real.

The network of pix2pix as VQGAN uses it, with its key names (main.N.*) and its initialisation. Not here: what the
numbers are trained for and who is frozen when (train/), and ranks: how statistics are gathered the caller passes in.

Batch norms keep no running statistics: a discriminator is only used while it learns, and what nobody reads need not
be kept equal on all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vqscale.nets.config.discriminators import PatchGANConfig
from vqscale.nets.discriminators import Answer, Gather, alone


class SyncBatchNorm(nn.Module):
    """(B, C, H, W) -> the same, each channel normalised over the images that `gather` reaches; batch norm on one
    process.

    Every process passes a batch of the same shape. One gather of 2 C numbers forward, whose gradients come back: the
    images of a process have a part in the losses of all others.
    """

    def __init__(self, channels: int, gather: Gather = alone, eps: float = 1e-5) -> None:
        super().__init__()
        self.gather, self.eps = gather, eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        here = torch.stack(torch.var_mean(wide, dim=(0, 2, 3), correction=0))
        variances, means = self.gather(here[None]).unbind(1)  # (ranks, C) each
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)  # of equal numbers of values; nothing cancels
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return ((wide - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)


class PatchGAN(nn.Module):
    """Images (B, in_channels, H, W) -> one answer: a number per patch (B, 1, h, w), no sigmoid.

    With the default config patches are 70 pixels wide and overlap, and 256 pixels give 30 x 30 of them. Batch norm uses
    the statistics of the batch in evaluation too.
    """

    def __init__(self, config: PatchGANConfig, gather: Gather = alone) -> None:
        super().__init__()
        widths = [config.channels * min(2**layer, 8) for layer in range(config.num_layers + 1)]
        layers: list[nn.Module] = [nn.Conv2d(config.in_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(1, config.num_layers + 1):
            # a norm over the batch takes a bias away again; one over groups of channels does not
            stride, bias = (2 if layer < config.num_layers else 1), config.norm == "group"
            layers += [
                nn.Conv2d(widths[layer - 1], widths[layer], 4, stride=stride, padding=1, bias=bias),
                _norm(widths[layer], config, gather),
                nn.LeakyReLU(0.2),
            ]
        layers.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*layers)
        self.main.apply(_initialise)

    def forward(self, images: Tensor) -> list[Answer]:
        return [Answer(self.main(images))]


def _norm(channels: int, config: PatchGANConfig, gather: Gather) -> nn.Module:
    if config.norm == "group":
        return nn.GroupNorm(config.num_groups, channels)
    if config.norm == "sync":
        return SyncBatchNorm(channels, gather)
    return nn.BatchNorm2d(channels, track_running_stats=False)


@torch.no_grad()
def _initialise(module: nn.Module) -> None:
    """Weights from N(0, 0.02), those of norms from N(1, 0.02); biases of norms are 0, others as torch draws them."""
    if isinstance(module, nn.Conv2d):
        module.weight.normal_(0.0, 0.02)
    elif isinstance(module, nn.BatchNorm2d | nn.GroupNorm | SyncBatchNorm):
        module.weight.normal_(1.0, 0.02)
