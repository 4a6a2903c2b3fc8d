"""Weight normalisation (Salimans and Kingma 2016) with the names of torch's older form, which published weights have:
two parameters, weight_g and weight_v, so that both can be averaged, loaded and saved as what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NormedConv(nn.Module):
    """A convolution with the weight g v / |v|, the norm over all dims but the first; it begins as the one it is given.

    Scaling v by a positive number changes nothing.
    """

    def __init__(self, conv: nn.Conv1d | nn.Conv2d) -> None:
        super().__init__()
        self.stride, self.padding = conv.stride, conv.padding
        self.weight_g = nn.Parameter(_norm(conv.weight.detach()))
        self.weight_v = nn.Parameter(conv.weight.detach())
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_v * (self.weight_g / _norm(self.weight_v))
        convolve = F.conv1d if weight.ndim == 3 else F.conv2d
        return convolve(x, weight, self.bias, self._steps(x), self.padding)

    def _steps(self, x: Tensor) -> tuple[int, ...]:
        """The stride, but 1 along a side where the kernel has one place alone: with more, oneDNN's gradient of a weight
        in bfloat16 is of memory that nobody wrote (torch 2.13, processors with AVX512)."""
        padding = (int(pad) for pad in self.padding)
        sides = zip(self.stride, padding, x.shape[2:], self.weight_v.shape[2:], strict=True)
        return tuple(1 if side + 2 * pad == kernel else stride for stride, pad, side, kernel in sides)


class NormedTransposed(nn.Module):
    """A transposed convolution of one side with the weight g v / |v|, the norm over all dims but the first, which are
    its inputs; it begins as the one it is given."""

    def __init__(self, conv: nn.ConvTranspose1d) -> None:
        super().__init__()
        self.stride = conv.stride
        self.weight_g = nn.Parameter(_norm(conv.weight.detach()))
        self.weight_v = nn.Parameter(conv.weight.detach())
        self.bias = conv.bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight_v * (self.weight_g / _norm(self.weight_v))
        return F.conv_transpose1d(x, weight, self.bias, self.stride)


def _norm(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
