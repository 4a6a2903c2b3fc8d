"""The Triton kernel of the backward pass of a mixture: the gradient of a block of logits, written once, in one pass.

What a block gives to x and to the keys are two products of the library (softmax/backward.py), whose sums have an order:
they are the same in every run. What the kernel is given is in passes.py, how large a block is in tiles.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vqscale.codes.gpu.kernels import counts, load_rows, scores

# What arrives per token, named once: passes.py stacks it in this order, the kernel loads it in this order. The top is
# the best score over all K, as the products here see it; the others are those of Slopes.
UPSTREAM = ("top", "shift", "entropy_log", "level", "bend")


@triton.jit
def logit_gradient_kernel(
    X, C, BIAS, UNIT, V, G, UP, COLUMNS, OUT, num_tokens, num_codes, dim, codes_per_part, scale, ratio,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, HAS_MEAN: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, HAS_COLUMNS: tl.constexpr, SAME: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """OUT[n, j] = du_nj of softmax/backward.py's Slopes, in OUT's type: 2 products (logits, g . value).

    Programs: token tiles x parts of the codes. UP[n] are the numbers of UPSTREAM. SAME says that V is C.
    """
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    here = token < num_tokens
    first = tl.program_id(1) * codes_per_part
    last = tl.minimum(first + codes_per_part, num_codes)
    x = load_rows(X, token, num_tokens, dim, BLOCK_D)
    g = x
    if HAS_MEAN:
        g = load_rows(G, token, num_tokens, dim, BLOCK_D)
    top = tl.load(UP + 5 * token, mask=here, other=0.0)
    shift = tl.load(UP + 5 * token + 1, mask=here, other=0.0)
    entropy_log = tl.load(UP + 5 * token + 2, mask=here, other=0.0)
    level = tl.load(UP + 5 * token + 3, mask=here, other=0.0)
    bend = tl.load(UP + 5 * token + 4, mask=here, other=0.0)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        c = load_rows(C, row, last, dim, BLOCK_D)
        below = (scores(x, c, BIAS, UNIT, row, last, HAS_BIAS, SCALED) - top[:, None]) * scale
        du = tl.zeros_like(below)
        if HAS_SHIFT:
            slope = tl.zeros_like(below)
            if HAS_MEAN:
                if SAME:
                    slope = tl.dot(g, tl.trans(c), input_precision="ieee")
                else:
                    slope = tl.dot(g, tl.trans(load_rows(V, row, last, dim, BLOCK_D)), input_precision="ieee")
            du = tl.exp2(below) * (slope - shift[:, None])
        if HAS_ENTROPY or HAS_COLUMNS:
            logq = below * ratio - entropy_log[:, None]
            if counts(logq):
                pull = tl.zeros_like(below) - level[:, None]
                if HAS_ENTROPY:
                    pull -= bend[:, None] * logq
                if HAS_COLUMNS:
                    pull += tl.load(COLUMNS + row, mask=row < last, other=0.0)[None, :]
                du += tl.exp2(logq) * pull
        place = token.to(tl.int64)[:, None] * num_codes + row[None, :]
        tl.store(OUT + place, du.to(OUT.dtype.element_ty), mask=here[:, None] & (row < last)[None, :])
