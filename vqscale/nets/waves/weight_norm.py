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
        return convolve(x, weight, self.bias, self.stride, self.padding)


def _norm(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)
