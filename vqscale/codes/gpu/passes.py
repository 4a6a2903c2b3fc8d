"""The passes of scan.py and softmax/ as fused GPU kernels: same signatures, same answers, no wait for the device.

Tiles live in registers and shared memory. Beyond its outputs an operation needs operands in the kernels' type, the
peaks of chunks of codes (4 bytes per token and 64 codes; 64 MiB at 4096 x 262,144), parts of token sums (16 x tokens x
D floats at most), and in the backward pass one block of gradients of logits, which the budget and the cache of the
device bound (tiles.wave; 33 MiB on a H200). Products of 2 B k D operations:

    best         1   logits                                             + float64 products of the few chunks in doubt
    mix          2   logits, mean row                                   + the same
    column_sums  1   logits
    row_means    1   logits
    mix_backward 4   logits and values in the kernel, which writes a block once; x and the keys by the library, which
                     reads it while it is in the cache: the form and the two products of softmax/backward.py

The operands of the products are bfloat16 in `best`, elsewhere where such products are wanted (products.py) or if x and
the keys are, of scores float8 where that is wanted; else float32 without tensor cores, by which the kernels are judged:
backend.py does not choose it. TF32 multiplies nothing here. Sums, powers and the state of the softmax are float32 in
all, and so are the sums of the library's products, in the order of the blocks: the same in every run.

What bfloat16 loses, with u = 2^-8 its rounding, C and V the norms of the longest key and value, to first order in u:

* a logit is off by at most 2 u |x| C / T, a log-normaliser by twice that. At 256 dimensions and logits of unit variance
  entropies at temperature 0.01, which are 0.06 in the mean, move by 0.02 (root mean square);
* given the logits, a mean row is off by at most 2 u V, the gradient of x by u (2 sum_j |du_j| |key_j| + 4 |g| V C / T),
  that of row j by u sum_n (2 |du_nj| + 4 p_nj |g_n| V / T) |x_n|, in the letters of softmax/backward.py: rounded are
  the probabilities, g, the values, du, and what du multiplies.

float8 (e4m3, engine.matmul: low) is for the scores of all but `best`, in units of a power of two for all tokens and one
for all codes (products.py). What it loses, with X' and C' the largest numbers of all tokens and all keys:

* a score is off by at most 2^-3 |x| C + 2^-17 sqrt(D) (X' C + |x| C'), to first order, and by D 2^-13 |x| C more where
  tensor cores cut its sums off; a logit by a T-th of that, a log-normaliser by twice as much; what is not a score keeps
  its u. Entropies as above move by 0.2, with exact sums
* nothing of ids, which are exact: but the bound below is as much wider, and what it leaves in doubt is scored again in
  float64. Of 1024 chunks that are 617 for a normal token, so that all are, and one for a token near its row. It is a
  choice for codes that have found their tokens, and takes longer before (tools/bench rounding measures all of this).

Ids do not depend on what is rounded: they are the arg max of the float64 scores of the given numbers. For that the
kernels keep the best score of every chunk of codes, and score again, in float64, every chunk that the error bound of
its peak does not exclude. With x = x' + dx, c = c' + dc, and x', c' what was multiplied,

    |x.c - x'.c'| <= |dx| |c| + |x'| |dc| + rounding of D additions,    in the worst of the codes of a chunk

(Cauchy-Schwarz; an addition keeps 21 bits, those of float8 13, as tensor cores are known to). That leaves 1.7 chunks
per token of 131,072 normal rows for normal tokens, one for tokens near their rows, and all of them where all rows are
equal: that is slow and right. Equal scores go to the lowest row.

torch's scaled_dot_product_attention is not used. Its flash form makes the same mean row and returns the log-normaliser,
but no arg max, no second temperature and no bias per code: ids and entropies would each be another pass over the codes.
Its backward pass has no gradient for the log-normaliser and makes one for the values, a product that nobody wants here.

Every kernel is compared with dense.py in Triton's interpreter and compiles for sm_80, sm_89, sm_90, sm_100 and sm_120
(tools/bench kernels). None has been timed on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vqscale.codes.gpu import operators as ops
from vqscale.codes.gpu.kernels_backward import UPSTREAM
from vqscale.codes.scan import Keys
from vqscale.codes.softmax.backward import Gradients, Slopes, Upstream
from vqscale.codes.softmax.forward import LocalMixture, Softmax, Wanted


def best(x_BD: Tensor, keys: Keys, budget: int) -> tuple[Tensor, Tensor]:
    """The highest score of each token over the rows of this rank, float64, and the lowest row that has it.

    Exact, so its products are bfloat16 whatever torch is set to.
    """
    score_B, row_B = ops.best(x_BD, keys.keys_kD, keys.bias_k, "bf16")
    return score_B, row_B


@dataclass
class FusedLocalMixture(LocalMixture):
    """The softmax is one of the products' scores plus `gain_B`, a shift per token that makes the best of them exact."""

    gain_B: Tensor = field(default_factory=lambda: torch.zeros(()))


def _top(mixed: LocalMixture, score_B: Tensor) -> Tensor:
    """The best score over all K, as the products of this rank see it."""
    assert isinstance(mixed, FusedLocalMixture)
    return score_B - mixed.gain_B


def mix(x_BD: Tensor, keys: Keys, values_kD: Tensor, wanted: Wanted) -> LocalMixture:
    """One pass, as forward.mix. The best row is exact; the softmax is that of the products' precision, in float32."""
    score_B, row_B, state_4B, sum_BD = ops.mix(
        x_BD, keys.keys_kD, keys.bias_k, values_kD, wanted.scale, wanted.ratio, wanted.products
    )
    top_B, sum_B, entropy_sum_B, excess_B = state_4B.unbind(0)
    soft = Softmax(sum_B, torch.zeros_like(sum_B))
    entropy_soft = None if wanted.ratio is None else Softmax(entropy_sum_B, excess_B)
    score_B = score_B.to(top_B.dtype)
    return FusedLocalMixture(row_B, score_B, soft, sum_BD, entropy_soft, gain_B=score_B - top_B)


def column_sums(
    x_BD: Tensor, keys: Keys, mixed: LocalMixture, score_B: Tensor, log_B: Tensor, wanted: Wanted
) -> Tensor:
    """sum_n q_nj of the rows of this rank, as forward.column_sums: k numbers."""
    out_k: Tensor = ops.column_sums(
        x_BD, keys.keys_kD, keys.bias_k, wanted.entropy_scale, _top(mixed, score_B), log_B, wanted.products
    )
    return out_k


def row_means(
    x_BD: Tensor, keys: Keys, mixed: LocalMixture, score_B: Tensor, log_B: Tensor, weight_k: Tensor, wanted: Wanted
) -> Tensor:
    """sum_j q_nj weight_j over the rows of this rank, as forward.row_means: B numbers."""
    out_B: Tensor = ops.row_means(
        x_BD, keys.keys_kD, keys.bias_k, wanted.entropy_scale, _top(mixed, score_B), log_B, weight_k, wanted.products
    )
    return out_B


def mix_backward(
    x_BD: Tensor, keys: Keys, values_kD: Tensor, mixed: LocalMixture, up: Upstream, wanted: Wanted
) -> Gradients:
    """The backward pass, as backward.mix_backward; gradients come in the types of x and the keys."""
    at = Slopes.of(up, wanted)
    numbers = {
        "top": _top(mixed, up.score_B),
        "shift": at.shift_B,
        "entropy_log": at.entropy_log_B,
        "level": at.level_B,
        "bend": at.bend_B,
    }
    zero_B = torch.zeros_like(up.log_B)
    upstream = [zero_B if (part_B := numbers[name]) is None else part_B for name in UPSTREAM]
    dx_BD, dkeys_kD, dbias_k = ops.mix_backward(
        x_BD,
        keys.keys_kD,
        keys.bias_k,
        values_kD,
        torch.stack(upstream, dim=1),
        at.g_BD,
        at.columns_k,
        at.shift_B is not None,
        at.bend_B is not None,
        wanted.scale,
        wanted.ratio or 1.0,
        wanted.budget,
        wanted.products,
    )
    return Gradients(dx_BD, dkeys_kD, None if keys.bias_k is None else dbias_k)
