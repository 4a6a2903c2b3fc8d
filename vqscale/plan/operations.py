"""Operations of products that a run does for one image, by counting: for --dry-run, and for the rates on the board.

They are those that the mathematics asks for, in the forward and the backward pass. A softmax on a CPU that leaves out
what cannot be told from zero does fewer; checkpointing of activations would do more.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch

from vqscale import quantizers
from vqscale.config import to_dict
from vqscale.nets.config import NetConfig
from vqscale.parallel.mesh import Mesh
from vqscale.plan.count import code_axis, network
from vqscale.quantizers.config import QuantizerConfig
from vqscale.quantizers.config.compositions import GroupedConfig, ResidualConfig
from vqscale.quantizers.config.tables import EMAConfig, IBQConfig, SimVQConfig, VQConfig
from vqscale.train.config import Run, TokenizerRun
from vqscale.train.config.losses import LossConfig


def training(config: Run) -> int:
    """Of one image in training."""
    if config.task == "prior":
        from vqscale.plan.prior import counted

        return in_training(counted(config))
    return in_training(of_tokenizer(config))


def in_training(counted: Mapping[str, int]) -> int:
    return sum(n for name, n in counted.items() if name.startswith("training"))


def of_tokenizer(config: TokenizerRun) -> dict[str, int]:
    """By part. What is frozen counts as if it were not, and of images of several shapes the largest."""
    net, quantizer = config.tokenizer.net, config.tokenizer.quantizer
    with torch.device("meta"):
        dim = quantizers.build(to_dict(quantizer), Mesh(device="meta")).dim
    both, beside, tokens = _networks(net, tuple(config.data.train.sides), dim, config.loss)
    axis = tokens * per_token(quantizer)
    return {
        "training: encoder, decoder": both,
        **({"training: LPIPS, discriminator": beside} if beside else {}),
        **({"training: code axis": axis} if axis else {}),
    }


@cache
def _networks(net: NetConfig, sides: tuple[int, ...], dim: int, loss: LossConfig) -> tuple[int, int, int]:
    """(operations of encoder and decoder, of LPIPS and discriminator, tokens of an image): most runs of a study have
    one network."""
    found = network(net, sides, dim, loss)
    return found.forward + found.backward, sum(kernel.operations for kernel in found.loss_kernels), found.tokens


@cache
def per_token(quantizer: QuantizerConfig) -> int:
    """On the code axis for one token, with all codes. None are counted where there is no table, nor for SCQ, whose
    solver stops when it is done."""
    if isinstance(quantizer, ResidualConfig):
        return quantizer.levels * per_token(quantizer.inner)
    if isinstance(quantizer, GroupedConfig):
        return quantizer.groups * per_token(quantizer.inner)
    if not isinstance(quantizer, VQConfig | EMAConfig | IBQConfig | SimVQConfig):
        return 0
    return code_axis(to_dict(quantizer)).products * 2 * quantizer.num_codes * quantizer.dim
