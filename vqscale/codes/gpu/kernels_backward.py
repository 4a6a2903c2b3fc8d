"""Triton kernels of the backward pass of a mixture: the gradient of the logits, a tile at a time, into x and the keys.

Two kernels make the same tiles again, because a program can keep the sums of its tokens or of its codes but not both:
what one would have to hand to the other is tokens x codes, or sums by atomics in an order that changes from run to run.
So the sums here are the same in every run. What the kernels are given, and how parts are merged, is in passes.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vqscale.codes.gpu.kernels import counts, load_rows


@triton.jit
def logit_gradient(
    below, slope, log, shift, entropy_log, g_entropy, entropy, g_columns, g_columns_mean, ratio,
    HAS_MEAN: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_COLUMNS: tl.constexpr,
):  # fmt: skip
    """p o (slope - shift) + ratio q o (g_columns - their mean - g_H (log q + H)), either tile orientation.

    `below` is the logit minus that of the best score; it and the logarithms of the sums are in bits, the entropy in
    nats. What is per token and what is per code comes with a dimension of one where the other runs.
    """
    out = tl.zeros_like(below)
    if HAS_SHIFT:
        p = tl.exp2(below - log)
        if HAS_MEAN:
            out += p * (slope - shift)
        else:
            out -= p * shift
    if HAS_ENTROPY or HAS_COLUMNS:
        logq = below * ratio - entropy_log
        if counts(logq):
            pull = tl.zeros_like(below)
            if HAS_ENTROPY:
                pull -= g_entropy * (logq * 0.6931471805599453 + entropy)
            if HAS_COLUMNS:
                pull += g_columns - g_columns_mean
            out += ratio * tl.exp2(logq) * pull
    return out


# What arrives per token, named once: passes.py stacks it in this order, `load_upstream` gives it in this order.
UPSTREAM = (
    "top",  # best score over all K, as the products here see it
    "log",  # log2 of the sum at the temperature, relative to the top
    "shift",  # what the softmax's centring subtracts
    "entropy_log",  # as log, at the entropy temperature
    "g_entropy",  # gradient of the entropy
    "entropy",  # in nats
    "g_columns_mean",  # mean of the gradient of the column sums
)


@triton.jit
def load_upstream(NUMBERS, token, end, num_tokens):
    """The numbers of UPSTREAM for some tokens, each a tile; zeros from token `end` on."""
    here = token < end
    return (
        tl.load(NUMBERS + token, mask=here, other=0.0),
        tl.load(NUMBERS + num_tokens + token, mask=here, other=0.0),
        tl.load(NUMBERS + 2 * num_tokens + token, mask=here, other=0.0),
        tl.load(NUMBERS + 3 * num_tokens + token, mask=here, other=0.0),
        tl.load(NUMBERS + 4 * num_tokens + token, mask=here, other=0.0),
        tl.load(NUMBERS + 5 * num_tokens + token, mask=here, other=0.0),
        tl.load(NUMBERS + 6 * num_tokens + token, mask=here, other=0.0),
    )


@triton.jit
def token_gradient_kernel(
    X, C, BIAS, V, G, NUMBERS, COLUMNS, OUT, num_tokens, num_codes, dim, codes_per_part, scale, out_scale, ratio,
    HAS_BIAS: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, SAME: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """OUT[part, n, :] = out_scale sum over the codes of a part of dl_nj c_j: 3 products (logits, slope, gradient)."""
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    first = part * codes_per_part
    last = tl.minimum(first + codes_per_part, num_codes)
    x = load_rows(X, token, num_tokens, dim, BLOCK_D)
    g = x
    if HAS_MEAN:
        g = load_rows(G, token, num_tokens, dim, BLOCK_D)
    top, log, shift, entropy_log, g_entropy, entropy, g_columns_mean = load_upstream(
        NUMBERS, token, num_tokens, num_tokens
    )
    out = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        c = load_rows(C, row, last, dim, BLOCK_D)
        score = tl.dot(x, tl.trans(c), input_precision="ieee")
        if HAS_BIAS:
            score += tl.load(BIAS + row, mask=row < last, other=0.0)[None, :]
        below = (score - top[:, None]) * scale
        slope = below
        if HAS_MEAN:
            if SAME:
                slope = tl.dot(g, tl.trans(c), input_precision="ieee")
            else:
                v = load_rows(V, row, last, dim, BLOCK_D)
                slope = tl.dot(g, tl.trans(v), input_precision="ieee")
        g_columns = tl.zeros([BLOCK_K], tl.float32)
        if HAS_COLUMNS:
            g_columns = tl.load(COLUMNS + row, mask=row < last, other=0.0)
        dl = logit_gradient(
            below, slope, log[:, None], shift[:, None], entropy_log[:, None], g_entropy[:, None], entropy[:, None],
            g_columns[None, :], g_columns_mean[:, None], ratio, HAS_MEAN, HAS_SHIFT, HAS_ENTROPY, HAS_COLUMNS,
        )  # fmt: skip
        # Where there is no code the exponentials may be infinite, and infinity times zero is not a number.
        dl = tl.where((row < last)[None, :], dl, 0.0)
        out = tl.dot(dl.to(c.dtype), c, out, input_precision="ieee")
    column = tl.arange(0, BLOCK_D)
    place = (part.to(tl.int64) * num_tokens + token)[:, None] * dim + column[None, :]
    tl.store(OUT + place, out * out_scale, mask=(token < num_tokens)[:, None] & (column < dim)[None, :])


@triton.jit
def key_gradient_kernel(
    X, C, BIAS, V, G, NUMBERS, COLUMNS, OUT, OUT_BIAS,
    num_tokens, num_codes, dim, tokens_per_part, scale, out_scale, ratio,
    HAS_BIAS: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, SAME: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """OUT[part, j, :] = out_scale sum over the tokens of a part of dl_nj x_n, OUT_BIAS the same of dl_nj: 3 products.

    Tiles are codes x tokens, so that dl is the left operand of its product as it lies in registers.
    """
    row = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    first = part * tokens_per_part
    last = tl.minimum(first + tokens_per_part, num_tokens)
    here = row < num_codes
    c = load_rows(C, row, num_codes, dim, BLOCK_D)
    v = c
    if HAS_MEAN and not SAME:
        v = load_rows(V, row, num_codes, dim, BLOCK_D)
    bias = tl.zeros([BLOCK_K], tl.float32)
    if HAS_BIAS:
        bias = tl.load(BIAS + row, mask=here, other=0.0)
    g_columns = tl.zeros([BLOCK_K], tl.float32)
    if HAS_COLUMNS:
        g_columns = tl.load(COLUMNS + row, mask=here, other=0.0)
    out = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    out_bias = tl.zeros([BLOCK_K], tl.float32)
    for start in range(first, last, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        x = load_rows(X, token, last, dim, BLOCK_D)
        top, log, shift, entropy_log, g_entropy, entropy, g_columns_mean = load_upstream(
            NUMBERS, token, last, num_tokens
        )
        score = tl.dot(c, tl.trans(x), input_precision="ieee") + bias[:, None]
        below = (score - top[None, :]) * scale
        slope = below
        if HAS_MEAN:
            g = load_rows(G, token, last, dim, BLOCK_D)
            slope = tl.dot(v, tl.trans(g), input_precision="ieee")
        dl = logit_gradient(
            below, slope, log[None, :], shift[None, :], entropy_log[None, :], g_entropy[None, :], entropy[None, :],
            g_columns[:, None], g_columns_mean[None, :], ratio, HAS_MEAN, HAS_SHIFT, HAS_ENTROPY, HAS_COLUMNS,
        )  # fmt: skip
        dl = tl.where((token < last)[None, :], dl, 0.0)
        out = tl.dot(dl.to(x.dtype), x, out, input_precision="ieee")
        if HAS_BIAS:
            out_bias += tl.sum(dl, axis=1)
    column = tl.arange(0, BLOCK_D)
    place = (part.to(tl.int64) * num_codes + row)[:, None] * dim + column[None, :]
    tl.store(OUT + place, out * out_scale, mask=here[:, None] & (column < dim)[None, :])
    if HAS_BIAS:
        tl.store(OUT_BIAS + part.to(tl.int64) * num_codes + row, out_bias * out_scale, mask=here)
