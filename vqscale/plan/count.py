"""What code does, counted and not timed: operations and bytes of every kernel of a forward and backward pass.

Two counts on the meta device. `network`: encoder and decoder on one image, the exact operations of products and
convolutions and the bytes that all kernels read and write. `code_axis`: one block of a quantizer, in units of tokens x
codes, so that the cost model (cost.py) follows the code and cannot be older than it. Nothing here is a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from vqscale import nets, quantizers
from vqscale.codes import tally
from vqscale.nets import discriminators
from vqscale.nets.config import NetConfig, example, grid
from vqscale.nets.discriminators import Answer
from vqscale.nets.lpips import LPIPS
from vqscale.parallel.mesh import Mesh
from vqscale.train.config.losses import LossConfig


@dataclass(frozen=True)
class Kernel:
    """One kernel: operations of its products (0 for everything that is none), elements of each tensor in and out."""

    name: str
    operations: int
    sizes: tuple[int, ...]  # bytes of every tensor that is read or written


NOTHING = ("_unsafe_view", "empty", "empty_like", "new_empty", "new_empty_strided")


class KernelCounter(TorchDispatchMode):
    """Records the kernels that run inside the block, those of backward passes included. Views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not func.is_view and func._opname not in NOTHING:
            # An operation in place (addmm_) does what its twin does, and only the twin is registered.
            count = flop_registry.get(getattr(torch.ops.aten, func._opname.rstrip("_"), None))
            operations = count(*args, **kwargs, out_val=out) if count else 0
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.kernels.append(Kernel(func._opname, operations, tuple(x.numel() * x.element_size() for x in tensors)))
        return out

    @property
    def operations(self) -> int:
        return sum(kernel.operations for kernel in self.kernels)


@dataclass(frozen=True)
class Network:
    """Encoder and decoder on one image: what an optimiser step's forward and backward pass do."""

    forward: int
    """operations of products and convolutions, a multiplication and an addition being two"""
    backward: int
    kernels: tuple[Kernel, ...]
    """all of both passes, float32"""
    parameters: int
    tokens: int
    """per image"""
    loss_kernels: tuple[Kernel, ...] = ()
    """of LPIPS and the discriminator"""


def network(config: NetConfig, sides: Sequence[int], dim: int, loss: LossConfig | None = None) -> Network:
    """Count the network of a tokenizer with latents of `dim` on one image of these sides, on the meta device.

    The convolutions around the quantizer count; with `loss`, so do LPIPS and the discriminator, apart.
    """
    places = grid(config, sides)
    with torch.device("meta"):
        parts = nets.build(config, dim)
        images, *context = (torch.empty(shape) for shape in example(config, sides))
        latents = torch.empty(1, dim, *places, requires_grad=True)
    with KernelCounter() as counter:
        first = parts.quant_conv(parts.encoder(images, *context))
        second = parts.decoder(parts.post_quant_conv(latents), *context)
        forward = counter.operations
        torch.autograd.backward([first, second], [torch.empty_like(first), torch.empty_like(second)])
    return Network(
        forward,
        counter.operations - forward,
        tuple(counter.kernels),
        sum(p.numel() for part in parts[:4] for p in part.parameters()),
        math.prod(places),
        () if loss is None else loss_kernels(loss, config.in_channels, sides),
    )


def loss_kernels(loss: LossConfig, channels: int, sides: Sequence[int]) -> tuple[Kernel, ...]:
    """The kernels of LPIPS and the discriminator on one sample: the discriminator's own step on sample and
    reconstruction, then both on the reconstruction, forward and back to it, and for matching features the sample once
    more. An adaptive weight's extra gradients do not count."""
    with torch.device("meta"):
        image, recon = torch.empty(1, channels, *sides), torch.empty(1, channels, *sides, requires_grad=True)
        lpips = None if loss.perceptual is None else LPIPS()
        discriminator = None if loss.adversarial is None else discriminators.build(loss.adversarial.net)
    with KernelCounter() as counter:
        if lpips is not None:
            lpips(image, recon).sum().backward()
        if discriminator is not None:
            (_mean(discriminator(image)) + _mean(discriminator(recon.detach()))).backward()
            discriminator.requires_grad_(False)
            _mean(discriminator(recon)).backward()
            if loss.adversarial is not None and loss.adversarial.feature_weight:
                discriminator(image)
    return tuple(counter.kernels)


def _mean(answers: list[Answer]) -> Tensor:
    return torch.stack([answer.values.mean() for answer in answers]).sum()


@dataclass(frozen=True)
class CodeAxis:
    """What one training step does per token and code where its blocks are dense.

    On a CPU a softmax that leaves few codes above rounding is done by pairs (codes/softmax/pairs.py) and costs less.
    """

    products: int
    """matrix products of 2 N K D operations"""
    passes: float
    """reads and writes of a number per token and code, outside products"""
    exponentials: float


EXPONENTIALS = ("exp", "exp_", "exp2", "exp2_")
# Sizes that no other tensor of the pass has: what is tokens x codes is told by its number of elements.
_TOKENS, _CODES, _DIM = 96, 192, 8


def code_axis(settings: Mapping[str, Any]) -> CodeAxis:
    """Count one driven training step of a quantizer with one table, given as its plain settings, in one block."""
    small = {"num_codes": _CODES, "dim": _DIM, "revive_every": 0, "init": "normal", "landing_steps": 0}
    with torch.device("meta"):
        quantizer = quantizers.build({**settings, **small}, Mesh(device="meta"))
        x_ND = torch.empty(_TOKENS, _DIM, requires_grad=True)
    quantizer.train()
    quantizer.begin()
    with tally.silent(), KernelCounter() as counter:
        out = quantizer(x_ND)
        losses = torch.stack(list(out.losses.values())).sum()
        torch.autograd.backward([out.z, losses], [torch.ones_like(out.z), None])
    pairs, product = _TOKENS * _CODES, 2 * _TOKENS * _CODES * _DIM
    return CodeAxis(
        round(counter.operations / product),
        sum(_passes(kernel, 4 * pairs) for kernel in counter.kernels if not kernel.operations),
        sum(kernel.name in EXPONENTIALS and 4 * pairs in kernel.sizes for kernel in counter.kernels),
    )


def _passes(kernel: Kernel, nbytes: int) -> int:
    return sum(size == nbytes for size in kernel.sizes)


def traffic(kernels: Iterable[Kernel]) -> int:
    """Bytes that these kernels read and write."""
    return sum(sum(kernel.sizes) for kernel in kernels)
