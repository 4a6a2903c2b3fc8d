"""`bench rounding`: what scores lose whose operands are rounded to bfloat16 or float8, beside float64. Times nothing.

float8 is that of vqscale/codes/products.py, e4m3 in units of the power of two that brings the largest number of all
rows to [128, 256): 3 bits of mantissa, so a number is off by 2^-4 of itself, or where it is small by half of the
smallest step,

    |x - x'|     <= 2^-4 |x| + sqrt(D) 2^-17 max |x_ni|             of a row; bfloat16: 2^-8 |x|
    |x.c - x'.c'| <= |x - x'| |c| + |x'| |c - c'|                   of a score, whose sums are exact here

Tokens are normal, or near their codes, which are normal: logits of normal tokens have variance one at the temperature,
and entropies are at a hundredth of it. Scores alone are rounded, not the values, nor what a gradient multiplies. What
a search does with the second bound is in vqscale/codes/gpu/passes.py: a chunk of codes whose best score may be the best
of all is scored again in float64, for all of 16 tokens at once where one of them wants it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor

from vqscale.codes import products
from vqscale.programs.commands import words

from . import command

CHUNK, TILE = 128, 16  # codes and tokens that are scored again at once
NEAR = 0.7  # deviation of tokens near a code

HEAD = """\
                        logits,  largest error    other     in doubt,  scored    entropy,     gradient
tokens   operands  error of them    / its bound      ids  chunks of all   again  moved by  of x, moved"""


def bfloat16(x_ND: Tensor) -> Tensor:
    return x_ND.to(torch.bfloat16).to(x_ND.dtype)


def float8(x_ND: Tensor) -> Tensor:
    """Rows as float8 has them."""
    low_ND, unit = products.float8(x_ND.float())
    return low_ND.to(x_ND.dtype) * unit


def bound(x_ND: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Of |x - x'|, a number per row."""
    norm_N = x_ND.norm(dim=1)
    if rounded is bfloat16:
        return 2.0**-8 * norm_N
    return 2.0**-4 * norm_N + sqrt(x_ND.shape[1]) * 2.0**-17 * x_ND.abs().amax()


ROUNDED = {"bf16": bfloat16, "float8": float8}


def main(argv: Sequence[str]) -> int:
    args = arguments(argv)
    report = {"rows": list(rows(args.tokens, args.codes, args.dim))}
    report |= command.origin("rounding", argv, "cpu", torch.get_num_threads())
    if args.json:
        print(json.dumps(report))
        return 0
    print(command.place(report), f"{args.tokens} tokens, {args.codes} codes, {args.dim} dimensions", "", sep="\n")
    print(HEAD)
    for row in report["rows"]:
        print(
            f"{row['tokens']:9}{row['operands']:10}{row['logit_rms']:13.4f}{row['worst']:15.2f}{row['other_ids']:9.1%}"
            f"{row['doubt']:9.1f}, {row['chunks']:4}{row['scored_again']:8.1%}{row['entropy']:6.3f}, "
            f"{row['entropy_rms']:.3f}{row['gradient']:10.4f}"
        )
    return 0


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    out = command.parser("rounding", __doc__)
    out.add_argument("--tokens", type=words.count, default=128, help="N (128)")
    out.add_argument("--codes", type=words.count, default=2**17, help="K (131072)")
    out.add_argument("--dim", type=words.count, default=256, help="D (256)")
    out.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return out.parse_args(argv)


def rows(num_tokens: int, num_codes: int, dim: int) -> Iterator[dict[str, Any]]:
    draw = torch.Generator().manual_seed(0)
    c_KD = torch.randn(num_codes, dim, generator=draw, dtype=torch.float64)
    x_ND = torch.randn(num_tokens, dim, generator=draw, dtype=torch.float64)
    near_ND = c_KD[torch.randint(num_codes, (num_tokens,), generator=draw)] + NEAR * x_ND
    g_ND = torch.randn(num_tokens, dim, generator=draw, dtype=torch.float64)
    for tokens, given_ND in {"normal": x_ND, "near": near_ND}.items():
        for operands in ROUNDED:
            yield {"tokens": tokens, "operands": operands, **lost(given_ND, c_KD, g_ND, operands)}


def lost(x_ND: Tensor, c_KD: Tensor, g_ND: Tensor, operands: str) -> dict[str, float]:
    rounded, temperature = ROUNDED[operands], sqrt(x_ND.shape[1])
    low_ND, low_KD = rounded(x_ND), rounded(c_KD)
    exact, score = x_ND @ c_KD.t(), low_ND @ low_KD.t()
    most = bound(x_ND, rounded)[:, None] * c_KD.norm(dim=1) + low_ND.norm(dim=1)[:, None] * bound(c_KD, rounded)
    again = in_doubt(x_ND, c_KD, low_ND, low_KD, score)
    entropy_N = _entropy(exact * (100 / temperature))
    moved_N = _entropy(score * (100 / temperature)) - entropy_N
    gradient, truth = (_gradient((part / temperature).softmax(1), g_ND, c_KD) for part in (score, exact))
    return {
        "logit_rms": float((score - exact).square().mean().sqrt() / temperature),
        "worst": float(((score - exact).abs() / most).max()),
        "other_ids": float((score.argmax(1) != exact.argmax(1)).double().mean()),
        "doubt": float(again.sum(1).double().mean()),
        "chunks": again.shape[1],
        "scored_again": float(torch.stack([part.any(0) for part in again.split(TILE)]).double().mean()),
        "entropy": float(entropy_N.mean()),
        "entropy_rms": float(moved_N.square().mean().sqrt()),
        "gradient": float((gradient - truth).norm() / truth.norm()),
    }


def in_doubt(x_ND: Tensor, c_KD: Tensor, low_ND: Tensor, low_KD: Tensor, score: Tensor) -> Tensor:
    """(N, chunks): where the best score may be, by the errors of the operands that there are."""
    peak = torch.stack([part.amax(1) for part in score.split(CHUNK, 1)], 1)
    longest, lost_most = (
        torch.stack([part.amax() for part in each.norm(dim=1).split(CHUNK)]) for each in (c_KD, c_KD - low_KD)
    )
    error = (x_ND - low_ND).norm(dim=1)[:, None] * longest + low_ND.norm(dim=1)[:, None] * lost_most
    return peak + error >= (peak - error).amax(1, keepdim=True)


def _entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def _gradient(p: Tensor, g_ND: Tensor, c_KD: Tensor) -> Tensor:
    """Of x, through the mean row whose gradient is g, but for the temperature."""
    slope = g_ND @ c_KD.t()
    return (p * (slope - (p * slope).sum(1, keepdim=True))) @ c_KD
