"""A transformer one token at a time: the arithmetic of Transformer.forward with a cache, in few operations.

With one token per sequence a pass reads every matrix and does little with it, so this is where drawing id after id
spends its time. The matrices are laid out once for products with few rows, the two halves of the hidden layer are one
product, and what autocast would round at every step is rounded once. Equal to Transformer.forward but for rounding.
No gradient and no dropout. The layout costs a copy of the matrices while it lives, on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from vqscale.matmul import Matrix
from vqscale.nets.transformer import Block, KVCache, Transformer, at_least_float32


class OneToken:
    """h of the next token of B sequences, given its vector; the cache has those before it, and has it afterwards."""

    @torch.no_grad()
    def __init__(self, net: Transformer, turns: Tensor, adapt: Sequence[Tensor] | None, cache: KVCache) -> None:
        """`turns` are those of all tokens (`rotary`), `adapt` is what net.adapt gave for the sequences.

        Under autocast matrices are rounded to its type here, as it would round them at each product.
        """
        self._turns = torch.view_as_complex(turns.contiguous())
        self._cache, self._norm = cache, net.norm
        self._adapt = [None] * (len(net.blocks) + 1) if adapt is None else [one.squeeze(2).unbind(1) for one in adapt]
        self._blocks = [_Block(block) for block in net.blocks if isinstance(block, Block)]

    @torch.no_grad()
    def __call__(self, x_BD: Tensor) -> Tensor:
        turn_p = self._turns[self._cache.filled]
        for block, adapt in zip(self._blocks, self._adapt, strict=False):
            x_BD = block(x_BD, turn_p, adapt, self._cache)
        self._cache.filled += 1
        h_BD = self._norm.forward(x_BD)
        if self._adapt[-1] is None:
            return h_BD
        scale_BD, shift_BD = self._adapt[-1]
        return h_BD * (1 + scale_BD) + shift_BD


class _Block:
    """transformer.Block for one token."""

    def __init__(self, block: Block) -> None:
        attention, ffn = block.attention, block.ffn
        self._layer, self._num_heads = attention.layer, attention.num_heads
        self._norm_attention, self._norm_ffn, self._norms = block.norm_attention, block.norm_ffn, attention.norms
        self._qkv, self._out = Matrix(attention.qkv.weight), Matrix(attention.out.weight)
        self._gate_up, self._down = Matrix(torch.cat([ffn.gate.weight, ffn.up.weight])), Matrix(ffn.down.weight)

    def __call__(self, x_BD: Tensor, turn_p: Tensor, adapt: Sequence[Tensor] | None, cache: KVCache) -> Tensor:
        if adapt is None:
            x_BD = x_BD + self._attention(self._norm_attention.forward(x_BD), turn_p, cache)
            return x_BD + self._ffn(self._norm_ffn.forward(x_BD))
        gate_1, gate_2, scale_1, scale_2, shift_1, shift_2 = adapt
        y_BD = self._norm_attention.forward(x_BD) * (1 + scale_1) + shift_1
        x_BD = x_BD + gate_1 * self._attention(y_BD, turn_p, cache)
        y_BD = self._norm_ffn.forward(x_BD) * (1 + scale_2) + shift_2
        return x_BD + gate_2 * self._ffn(y_BD)

    def _attention(self, x_BD: Tensor, turn_p: Tensor, cache: KVCache) -> Tensor:
        qkv_B3Sd = self._qkv(x_BD).unflatten(-1, (3, self._num_heads, -1))
        q_BSd, k_BSd, v_BSd = qkv_B3Sd.unbind(1)
        if self._norms is None:
            both_B2Sd = at_least_float32(qkv_B3Sd[:, :2])
        else:
            both_B2Sd = torch.stack([self._norms[0](q_BSd), self._norms[1](k_BSd)], 1)
        # a pair of numbers as one complex number, turned by a product
        pairs = torch.view_as_complex(both_B2Sd.unflatten(-1, (-1, 2)))
        q_BSd, k_BSd = torch.view_as_real(pairs * turn_p).flatten(-2).to(v_BSd.dtype).unbind(1)
        k_BSTd, v_BSTd = cache.extend(self._layer, k_BSd[:, :, None], v_BSd[:, :, None])
        return self._out(F.scaled_dot_product_attention(q_BSd[:, :, None], k_BSTd, v_BSTd).flatten(1))

    def _ffn(self, x_BD: Tensor) -> Tensor:
        gate, up = self._gate_up(x_BD).chunk(2, -1)
        return self._down(F.silu(gate) * up)
