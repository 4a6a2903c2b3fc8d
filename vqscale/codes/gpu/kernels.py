"""Triton kernels that read the logits once and keep none: peaks, exact rescoring, softmax and mean row, sums of q.

Only arithmetic on tiles of tokens x codes; logits are in bits, as in softmax/forward.py. What the kernels are given,
how many programs run and how their parts are merged is in operators.py; the kernels of the backward pass are in
kernels_backward.py. A tile of logits is one product with float32 accumulation; a program keeps its tokens (or codes)
and walks over the codes (or tokens). Rows of tokens and codes are contiguous, addresses are 64 bits wide, and tiles
that stick out of a tensor are masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST: tl.constexpr = tl.constexpr(-1e30)  # as in scan.py: below every logit, and finite
NEGLIGIBLE: tl.constexpr = tl.constexpr(-56.0)  # bits: K of them are below the rounding of one, for K below 2^32


@triton.jit
def counts(bits):
    """Whether a tile holds a probability, given in bits, that is not negligible; what is not a number counts.

    At a low temperature most tiles hold none, and their exponentials are left out.
    """
    return tl.min(tl.min((bits < NEGLIGIBLE).to(tl.int32), axis=1), axis=0) == 0


@triton.jit
def load_rows(pointer, row, end, dim, BLOCK_D: tl.constexpr):
    """Rows `row` of a matrix of `dim` columns, BLOCK_D wide; zeros from row `end` and from column `dim` on."""
    column = tl.arange(0, BLOCK_D)
    place = row.to(tl.int64)[:, None] * dim + column[None, :]
    return tl.load(pointer + place, mask=(row < end)[:, None] & (column < dim)[None, :], other=0.0)


@triton.jit
def scores(x, c, BIAS, UNIT, row, last, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr):
    """x . c + bias of a tile of tokens x codes; with SCALED the products of x and c are in units."""
    out = tl.dot(x, tl.trans(c), input_precision="ieee")
    if SCALED:
        out *= tl.load(UNIT)
    if HAS_BIAS:
        out += tl.load(BIAS + row, mask=row < last, other=0.0)[None, :]
    return out


@triton.jit
def peaks_kernel(
    X, C, BIAS, UNIT, PEAK, num_tokens, num_codes, dim, num_chunks, codes_per_part,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """PEAK[n, c] = max over the BLOCK_K codes of chunk c of x_n . c_j + bias_j. Programs: token tiles x parts of k."""
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(1) * codes_per_part
    last = tl.minimum(first + codes_per_part, num_codes)
    x = load_rows(X, token, num_tokens, dim, BLOCK_D)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        c = load_rows(C, row, last, dim, BLOCK_D)
        score = scores(x, c, BIAS, UNIT, row, last, HAS_BIAS, SCALED)
        score = tl.where((row < last)[None, :], score, LOWEST)
        place = token.to(tl.int64) * num_chunks + start // BLOCK_K
        tl.store(PEAK + place, tl.max(score, axis=1), mask=token < num_tokens)


@triton.jit
def widths_kernel(
    C, LOW, BIAS, UNIT, WIDTH, num_codes, dim, rounding,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """WIDTH[c] = what bounds the error of a chunk's scores: max |c_j|, max |c_j - low_j|, and rounding max |bias_j|.

    LOW, with SCALED in units of UNIT[2], is what the products read instead of C. A thousandth more, because these norms
    are rounded themselves.
    """
    row = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    here = row < num_codes
    square = tl.zeros([CHUNK], tl.float64)  # in float32 squares of small numbers are zero
    lost_square = tl.zeros([CHUNK], tl.float64)
    for start in range(0, dim, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        place = row.to(tl.int64)[:, None] * dim + column[None, :]
        inside = here[:, None] & (column < dim)[None, :]
        c = tl.load(C + place, mask=inside, other=0.0).to(tl.float32)
        low = tl.load(LOW + place, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            low *= tl.load(UNIT + 2)
        c, lost = c.to(tl.float64), (c - low).to(tl.float64)
        square += tl.sum(c * c, axis=1)
        lost_square += tl.sum(lost * lost, axis=1)
    out = WIDTH + 3 * tl.program_id(0)
    tl.store(out, 1.001 * tl.sqrt(tl.max(square, axis=0)))
    tl.store(out + 1, 1.001 * tl.sqrt(tl.max(lost_square, axis=0)))
    bias = tl.zeros([CHUNK], tl.float32)
    if HAS_BIAS:
        bias = tl.abs(tl.load(BIAS + row, mask=here, other=0.0))
    tl.store(out + 2, 1e-35 + rounding * tl.max(bias, axis=0))


@triton.jit
def rescore_kernel(
    X, C, BIAS, PEAK, FLOOR, LEFT, RIGHT, WIDTH, SCORE, ROW,
    num_tokens, num_codes, dim, num_chunks, chunks_per_part,
    HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The best float64 score and the lowest row that has it, among the chunks that may hold it.

    A chunk may hold the best code of token n unless PEAK[n, c] + error < FLOOR[n], with the error bound of the peak
    LEFT[n] WIDTH[c, 0] + RIGHT[n] WIDTH[c, 1] + WIDTH[c, 2]: products that overflow exclude nothing, and a token that
    is not a number has no such chunk. A tile none of whose tokens wants a chunk passes it by, so that the work follows
    the data without anybody waiting.
    """
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    here = token < num_tokens
    floor = tl.load(FLOOR + token, mask=here, other=float("inf"))
    left = tl.load(LEFT + token, mask=here, other=0.0)
    right = tl.load(RIGHT + token, mask=here, other=0.0)
    best = tl.full([BLOCK_N], LOWEST, tl.float64)
    best_row = tl.zeros([BLOCK_N], tl.int32)
    first = part * chunks_per_part
    for chunk in range(first, tl.minimum(first + chunks_per_part, num_chunks)):
        peak = tl.load(PEAK + token.to(tl.int64) * num_chunks + chunk, mask=here, other=float("-inf"))
        error = left * tl.load(WIDTH + 3 * chunk) + right * tl.load(WIDTH + 3 * chunk + 1)
        below = peak + (error + tl.load(WIDTH + 3 * chunk + 2)) < floor
        wanted = here & (left == left) & (below == 0)
        if tl.max(wanted.to(tl.int32), axis=0) > 0:
            row = chunk * CHUNK + tl.arange(0, CHUNK)
            score = tl.zeros([BLOCK_N, CHUNK], tl.float64)
            for start in range(0, dim, BLOCK_D):
                column = start + tl.arange(0, BLOCK_D)
                inside = (column < dim)[None, :]
                x = tl.load(X + token.to(tl.int64)[:, None] * dim + column[None, :], here[:, None] & inside, 0.0)
                c = tl.load(
                    C + row.to(tl.int64)[:, None] * dim + column[None, :], (row < num_codes)[:, None] & inside, 0.0
                )
                score = tl.dot(x.to(tl.float64), tl.trans(c.to(tl.float64)), score)
            if HAS_BIAS:
                score += tl.load(BIAS + row, mask=row < num_codes, other=0.0).to(tl.float64)[None, :]
            score = tl.where((row < num_codes)[None, :], score, LOWEST)
            value = tl.max(score, axis=1)
            lowest = tl.min(tl.where(score == value[:, None], row[None, :], num_codes), axis=1)
            better = value > best  # strictly: among equals the earlier chunk stays
            best = tl.where(better, value, best)
            best_row = tl.where(better, lowest, best_row)
    tl.store(SCORE + part.to(tl.int64) * num_tokens + token, best, mask=here)
    tl.store(ROW + part.to(tl.int64) * num_tokens + token, best_row, mask=here)


@triton.jit
def mix_kernel(
    X, C, BIAS, UNIT, V, STATE, MEAN, PEAK,
    num_tokens, num_codes, dim, num_chunks, codes_per_part, scale, ratio,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr, ENTROPY: tl.constexpr, SAME: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Online softmax of l = scale (x . c + bias) over one part of the codes, with the sum of p times the values.

    With s the scores before the scale, STATE[part, :, n] = max s, sum 2^(scale (s - max s)), and with ENTROPY that sum
    and the excess at scale ratio; MEAN[part, n, :] = sum 2^(scale (s - max s)) value; PEAK as in `peaks_kernel`. SAME
    says that V is C, which is then read once.
    """
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    first = part * codes_per_part
    last = tl.minimum(first + codes_per_part, num_codes)
    here = token < num_tokens
    x = load_rows(X, token, num_tokens, dim, BLOCK_D)
    top = tl.full([BLOCK_N], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    entropy_total = tl.zeros([BLOCK_N], tl.float32)
    excess = tl.zeros([BLOCK_N], tl.float32)
    mean = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        c = load_rows(C, row, last, dim, BLOCK_D)
        logit = scores(x, c, BIAS, UNIT, row, last, HAS_BIAS, SCALED)
        logit = tl.where((row < last)[None, :], logit, LOWEST)
        peak = tl.max(logit, axis=1)
        tl.store(PEAK + token.to(tl.int64) * num_chunks + start // BLOCK_K, peak, mask=here)
        higher = tl.maximum(top, peak)
        delta = (top - higher) * scale
        below = (logit - higher[:, None]) * scale
        if ENTROPY:
            entropy_below = below * ratio
            shrink = tl.exp2(delta * ratio)
            excess = shrink * (excess + delta * ratio * entropy_total)
            entropy_total *= shrink
            if counts(entropy_below):
                q = tl.exp2(entropy_below)
                excess += tl.sum(q * entropy_below, axis=1)
                entropy_total += tl.sum(q, axis=1)
        p = tl.exp2(below)
        shrink = tl.exp2(delta)
        total = shrink * total + tl.sum(p, axis=1)
        mean *= shrink[:, None]
        if SAME:
            mean = tl.dot(p.to(c.dtype), c, mean, input_precision="ieee")
        else:
            v = load_rows(V, row, last, dim, BLOCK_D)
            mean = tl.dot(p.to(v.dtype), v, mean, input_precision="ieee")
        top = higher
    state = STATE + part.to(tl.int64) * 4 * num_tokens + token
    tl.store(state, top, mask=here)
    tl.store(state + num_tokens, total, mask=here)
    if ENTROPY:
        tl.store(state + 2 * num_tokens, entropy_total, mask=here)
        tl.store(state + 3 * num_tokens, excess, mask=here)
    column = tl.arange(0, BLOCK_D)
    place = (part.to(tl.int64) * num_tokens + token)[:, None] * dim + column[None, :]
    tl.store(MEAN + place, mean, mask=here[:, None] & (column < dim)[None, :])


@triton.jit
def column_sums_kernel(
    X, C, BIAS, UNIT, TOP, LOG, OUT, num_tokens, num_codes, dim, tokens_per_part, scale,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """OUT[part, j] = sum over the tokens of a part of 2^(scale (x_n . c_j + bias_j - top_n) - log_n)."""
    row = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    part = tl.program_id(1)
    first = part * tokens_per_part
    last = tl.minimum(first + tokens_per_part, num_tokens)
    c = load_rows(C, row, num_codes, dim, BLOCK_D)
    bias = tl.zeros([BLOCK_K], tl.float32)
    if HAS_BIAS:
        bias = tl.load(BIAS + row, mask=row < num_codes, other=0.0)
    total = tl.zeros([BLOCK_K], tl.float32)
    for start in range(first, last, BLOCK_N):
        token = start + tl.arange(0, BLOCK_N)
        x = load_rows(X, token, last, dim, BLOCK_D)
        top = tl.load(TOP + token, mask=token < last, other=0.0)
        log = tl.load(LOG + token, mask=token < last, other=0.0)
        logit = tl.dot(c, tl.trans(x), input_precision="ieee")
        if SCALED:
            logit *= tl.load(UNIT)
        bits = (logit + bias[:, None] - top[None, :]) * scale - log[None, :]
        if counts(bits):
            total += tl.sum(tl.where((token < last)[None, :], tl.exp2(bits), 0.0), axis=1)
    tl.store(OUT + part.to(tl.int64) * num_codes + row, total, mask=row < num_codes)


@triton.jit
def row_means_kernel(
    X, C, BIAS, UNIT, TOP, LOG, WEIGHT, OUT, num_tokens, num_codes, dim, codes_per_part, scale,
    HAS_BIAS: tl.constexpr, SCALED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """OUT[part, n] = sum over the codes of a part of 2^(scale (x_n . c_j + bias_j - top_n) - log_n) weight_j."""
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(1)
    first = part * codes_per_part
    last = tl.minimum(first + codes_per_part, num_codes)
    x = load_rows(X, token, num_tokens, dim, BLOCK_D)
    top = tl.load(TOP + token, mask=token < num_tokens, other=0.0)
    log = tl.load(LOG + token, mask=token < num_tokens, other=0.0)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_K):
        row = start + tl.arange(0, BLOCK_K)
        c = load_rows(C, row, last, dim, BLOCK_D)
        logit = scores(x, c, BIAS, UNIT, row, last, HAS_BIAS, SCALED)
        weight = tl.load(WEIGHT + row, mask=row < last, other=0.0)
        bits = (logit - top[:, None]) * scale - log[:, None]
        if counts(bits):
            q = tl.where((row < last)[None, :], tl.exp2(bits), 0.0)
            total += tl.sum(q * weight[None, :], axis=1)
    tl.store(OUT + part.to(tl.int64) * num_tokens + token, total, mask=token < num_tokens)
