"""The network of a head over bits (BAR, 2602.09024): of some bits that are seen, and a vector, to logits of all bits.

Residual SwiGLU blocks over the concatenated vectors of the bits; scales, shifts and gates of each are made of the
trunk's vector and of how many bits are masked. As published, but for the number of masked bits, which is a table here
and Fourier features of their share there, and for the output layer, which begins at zero. Not here: which bits are
masked, losses and drawing, which are the head's (codes/heads/bits.py).
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from vqscale.matmul import Linear
from vqscale.nets.config.transformer import TransformerConfig
from vqscale.nets.transformer import Adaptation, FeedForward, RMSNorm

MASKED = 2  # beside the values 0 and 1 of a bit


class Block(nn.Module):
    """x + gate ffn(scaled and shifted norm x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.adapt, self.ffn = Adaptation(config, 3, 1), FeedForward(config)
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, x_NW: Tensor, c_NW: Tensor) -> Tensor:
        gate, scale, shift = (part[:, 0] for part in self.adapt(c_NW).unbind(1))
        return x_NW + gate * self.ffn(self.norm(x_NW) * (1 + scale) + shift)


class MaskedBits(nn.Module):
    """bits_NS (0, 1 or MASKED) of N tokens and the trunk's h_ND -> l_NS2, the logits of 0 and 1 of every bit."""

    def __init__(self, num_bits: int, dim: int, width: int, num_layers: int, init_scale: float = 0.02) -> None:
        super().__init__()
        config = TransformerConfig(width=width, num_heads=1, ffn_multiple=1)
        each = -(-width // num_bits)
        self.values, self.enter = nn.Embedding(3, each), Linear(each * num_bits, width)
        self.condition, self.num_masked = Linear(dim, width), nn.Embedding(num_bits + 1, width)
        self.norm = RMSNorm(width, config.norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(num_layers))
        self.last, self.norm_last = Adaptation(config, 2, 0), RMSNorm(width, config.norm_eps)
        self.leave = Linear(width, 2 * num_bits)
        for part in self.modules():
            if isinstance(part, nn.Linear | nn.Embedding):
                nn.init.normal_(part.weight, 0.0, 0.0 if part is self.leave else init_scale)
            if isinstance(part, nn.Linear) and part.bias is not None:
                nn.init.zeros_(part.bias)

    def forward(self, bits_NS: Tensor, h_ND: Tensor) -> Tensor:
        c_NW = F.silu(self.condition(h_ND) + self.num_masked((bits_NS == MASKED).sum(1)))
        x_NW = self.norm(self.enter(self.values(bits_NS).flatten(1)))
        for block in self.blocks:
            x_NW = block(x_NW, c_NW)
        scale, shift = (part[:, 0] for part in self.last(c_NW).unbind(1))
        l_NS2: Tensor = self.leave(self.norm_last(x_NW) * (1 + scale) + shift)
        return l_NS2.unflatten(1, (-1, 2))
