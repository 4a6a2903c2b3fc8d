"""What a discriminator is: a module that answers a batch of samples with a list of answers, one for each of its parts.

PatchGAN has one part; discriminators of several periods or resolutions have one for each. What the answers are trained
for is in train/adversarial_losses.py. To add one: a file here, its settings and its line in config_discriminators.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor, nn

from vqscale.config import load_class
from vqscale.nets.config.discriminators import DiscriminatorConfig

# (n, ...) of this process -> (ranks * n, ...) of all, with gradients; the identity on one process
Gather = Callable[[Tensor], Tensor]


class Answer(NamedTuple):
    """What one part of a discriminator says of a batch; a tuple, because DeepSpeed's stage 3 looks into no dataclass
    for the tensors that a backward pass begins at."""

    values: Tensor  # (B, ...): numbers of its patches or pieces, high where it takes them for real
    features: tuple[Tensor, ...] = ()  # its maps on the way, for matching features; () where it shows none


def alone(x: Tensor) -> Tensor:
    """The gather of one process."""
    return x


def build(config: DiscriminatorConfig, gather: Gather = alone) -> nn.Module:
    """The discriminator of a config: samples -> list[Answer], as many as `num_answers` of the config says.

    `gather` is for what is normalised over the samples of all processes: the net itself knows of none.
    """
    net: nn.Module = load_class(config.module)(config, gather)
    return net
