"""A transformer over the tokens of a grid: vectors to vectors, in the designs of LlamaGen (2406.06525) and of the
priors of IBQ (2412.02692).

RMSNorm before each part, SwiGLU, no biases, rotary embedding over the sides of the grid, and with `adaln` scales,
shifts and gates made of the class. The residual stream and all norms are float32 under autocast. Not here: ids and
their number, which is the head's (codes/heads), the order in which tokens are made, and losses.

B sequences of T tokens of D numbers, S heads of d numbers, P tokens of prefix before those of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vqscale.matmul import Linear
from vqscale.nets.config.transformer import TransformerConfig


def at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def rotary(config: TransformerConfig, grid: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """Cosine and sine of every pair of numbers of a head, (P + tokens of the grid, d / 2, 2): the prefix, then the
    grid, its last side fastest.

    Each of the s sides turns an equal part of the pairs, in their order (rows the first half, columns the second), at
    frequencies base^(-2 s i / d); with one side this is the usual embedding of a sequence. With config.rotary sequence
    it is that of one row, the prefix its first tokens.
    """
    if config.rotary == "sequence":
        return _turns(config, [config.num_prefix + math.prod(grid)], device)
    prefix = torch.zeros(config.num_prefix, config.head_dim // 2, 2, device=device)
    if config.prefix_rotary == "identity":
        prefix[..., 0] = 1.0
    return torch.cat([prefix, _turns(config, grid, device)])


def _turns(config: TransformerConfig, grid: Sequence[int], device: torch.device | str | None) -> Tensor:
    half = config.head_dim // 2
    frequencies = config.rotary_base ** -(torch.arange(0, half, len(grid), device=device, dtype=torch.float32) / half)
    places = torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij")
    angles = torch.cat([torch.outer(place.flatten(), frequencies) for place in places], -1)
    return torch.stack([angles.cos(), angles.sin()], -1)


def rotate(x_BSTd: Tensor, turns: Tensor) -> Tensor:
    """Turn neighbouring pairs of numbers by the angles of their token, in float32."""
    pairs = at_least_float32(x_BSTd).unflatten(-1, (-1, 2))
    a, b, cos, sin = pairs[..., 0], pairs[..., 1], turns[..., 0], turns[..., 1]
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x = at_least_float32(x)
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight


class KVCache:
    """Keys and values of the tokens so far of B sequences, in memory for `length` tokens taken at once."""

    def __init__(self, config: TransformerConfig, batch: int, length: int, like: Tensor) -> None:
        """`like` has the device and the type of the network; under autocast keys and values have autocast's type."""
        kind = like.device.type
        on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        shape = (config.num_layers, batch, config.num_heads, length, config.head_dim)
        dtype = torch.get_autocast_dtype(kind) if on else like.dtype
        self._keys, self._values = (torch.empty(shape, dtype=dtype, device=like.device) for _ in range(2))
        self.filled = 0

    def extend(self, layer: int, k_BSTd: Tensor, v_BSTd: Tensor) -> tuple[Tensor, Tensor]:
        """Put the keys and values of the next T tokens of a layer in; returns those of all tokens so far."""
        span = slice(self.filled, self.filled + k_BSTd.shape[2])
        self._keys[layer, :, :, span] = k_BSTd
        self._values[layer, :, :, span] = v_BSTd
        return self._keys[layer, :, :, : span.stop], self._values[layer, :, :, : span.stop]


class Attention(nn.Module):
    """Softmax attention of S heads, every token to itself and those before it (causal) or to all."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.num_heads, self.share = layer, config.num_heads, config.dropout_attention
        self.qkv = Linear(config.width, 3 * config.width, bias=False)
        self.out = Linear(config.width, config.width, bias=False)
        self.norms = None
        if config.qk_norm:
            self.norms = nn.ModuleList(RMSNorm(config.head_dim, config.norm_eps) for _ in range(2))

    def forward(self, x_BTD: Tensor, turns: Tensor, causal: bool, cache: KVCache | None) -> Tensor:
        q, k, v = self.qkv(x_BTD).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if self.norms is not None:
            q, k = self.norms[0](q), self.norms[1](k)
        q, k = rotate(q, turns).to(v.dtype), rotate(k, turns).to(v.dtype)
        if cache is not None:
            assert q.shape[2] == 1 or cache.filled == 0, "a cache takes the beginning at once, then token by token"
            causal = causal and cache.filled == 0
            k, v = cache.extend(self.layer, k, v)
        share = self.share if self.training else 0.0
        y_BSTd = F.scaled_dot_product_attention(q, k, v, dropout_p=share, is_causal=causal)
        return self.out(y_BSTd.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate x) * up x)."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.gate = Linear(config.width, config.ffn_width, bias=False)
        self.up = Linear(config.width, config.ffn_width, bias=False)
        self.down = Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Adaptation(nn.Module):
    """`parts` vectors per sequence made of its class: Linear(SiLU(c)), the first `gates` of them small at first."""

    def __init__(self, config: TransformerConfig, parts: int, gates: int) -> None:
        super().__init__()
        self.parts = parts
        self.linear = Linear(config.width, parts * config.width)
        self.scales = [config.adaln_gate_scale] * gates + [0.5] * (parts - gates)  # of init_scale

    def forward(self, c_BD: Tensor) -> Tensor:
        """(B, parts, 1, D)."""
        return self.linear(F.silu(c_BD)).unflatten(-1, (self.parts, 1, -1))


class Block(nn.Module):
    """x + gate attention(norm x), then x + gate ffn(norm x); norms are scaled and shifted where there is adaln."""

    def __init__(self, config: TransformerConfig, layer: int) -> None:
        super().__init__()
        self.norm_attention, self.attention = RMSNorm(config.width, config.norm_eps), Attention(config, layer)
        self.norm_ffn, self.ffn = RMSNorm(config.width, config.norm_eps), FeedForward(config)
        self.drop_residual, self.drop_ffn = nn.Dropout(config.dropout_residual), nn.Dropout(config.dropout_ffn)

    def forward(
        self, x_BTD: Tensor, turns: Tensor, adapt: Tensor | None, causal: bool, cache: KVCache | None = None
    ) -> Tensor:
        if adapt is None:
            x_BTD = x_BTD + self.drop_residual(self.attention(self.norm_attention(x_BTD), turns, causal, cache))
            return x_BTD + self.drop_ffn(self.ffn(self.norm_ffn(x_BTD)))
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = adapt.unbind(1)
        y_BTD = self.norm_attention(x_BTD) * (1 + scale_1) + shift_1
        x_BTD = x_BTD + gate_1 * self.drop_residual(self.attention(y_BTD, turns, causal, cache))
        y_BTD = self.norm_ffn(x_BTD) * (1 + scale_2) + shift_2
        return x_BTD + gate_2 * self.drop_ffn(self.ffn(y_BTD))


class Transformer(nn.Module):
    """Vectors x_BTD of tokens to the vectors h_BTD that predict; first values as in the papers."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.drop_token = nn.Dropout(config.dropout_token)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.adapters = None
        if config.adaln:
            each = [Adaptation(config, 6, 2) for _ in range(config.num_layers)]
            self.adapters = nn.ModuleList([*each, Adaptation(config, 2, 0)])
        self.apply(self._first_values)

    @torch.no_grad()
    def _first_values(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            module.weight.normal_(0.0, self.config.init_scale)
            if module.bias is not None:
                module.bias.zero_()
        if isinstance(module, Adaptation):  # after its linear map
            for part, scale in zip(module.linear.weight.chunk(module.parts), module.scales, strict=True):
                part.mul_(scale)

    def adapt(self, c_BD: Tensor) -> list[Tensor] | None:
        """What the classes c do to each block and to the last norm; the same for every token. None without adaln."""
        return None if self.adapters is None else [adapter(c_BD) for adapter in self.adapters]

    def forward(
        self,
        x_BTD: Tensor,
        turns: Tensor,
        adapt: Sequence[Tensor] | None = None,
        *,
        causal: bool = True,
        cache: KVCache | None = None,
    ) -> Tensor:
        """`turns` are those of these T tokens (see `rotary`), `adapt` is what `adapt` gave for the sequences.

        With a cache the T tokens come after those that it holds, and it holds them afterwards too.
        """
        assert (adapt is None) == (self.adapters is None), "with adaln, and only then, the class adapts the blocks"
        x_BTD = self.drop_token(x_BTD)
        for layer, block in enumerate(self.blocks):
            given = (x_BTD, turns, None if adapt is None else adapt[layer], causal, cache)
            if self.config.checkpointing and self.training:
                x_BTD = checkpoint(block, *given, use_reentrant=False)
            else:
                x_BTD = block(*given)
        if cache is not None:
            cache.filled += x_BTD.shape[1]
        h_BTD = self.norm(x_BTD)
        if adapt is None:
            return h_BTD
        scale, shift = adapt[-1].unbind(1)
        return h_BTD * (1 + scale) + shift
