"""Random numbers that are functions of what they are for: a key per token, a counter per row. No state, no generator.

A key is mixed from integers (a seed, the number of an image, a position, a step), and number j of key n is the j-th
output of SplitMix64 started at the key (Steele, Lea and Flood 2014), in 64-bit arithmetic that wraps. So a token draws
the same numbers on any number of ranks, in any batch, block by block. The bits are the same on every device; their
logarithms may differ in the last place.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(x: int) -> int:
    """The 64 bits of x as torch.int64 has them."""
    return x - 2**64 if x >= 2**63 else x


GOLDEN = _signed(0x9E3779B97F4A7C15)
FIRST = _signed(0xBF58476D1CE4E5B9)
SECOND = _signed(0x94D049BB133111EB)


def _mix_(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 in place: every bit of the input moves every bit of the output."""
    spare = torch.empty_like(z)
    for shift, factor in ((30, FIRST), (27, SECOND), (31, 1)):
        torch.bitwise_right_shift(z, shift, out=spare)
        # torch shifts copies of the sign in; a logical shift has zeros there.
        z ^= spare.bitwise_and_((1 << (64 - shift)) - 1)
        if factor != 1:
            z *= factor
    return z


def keys(*parts: int | Tensor) -> Tensor:
    """One int64 key for each combination of integers, broadcast: keys(seed, images_N, positions_N) has N.

    The order of the parts counts: keys(a, b) is not keys(b, a).
    """
    devices = [part.device for part in parts if isinstance(part, Tensor)]
    device = devices[0] if devices else torch.device("cpu")
    key = torch.zeros((), dtype=torch.int64, device=device)
    for part in parts:
        if isinstance(part, int):
            part = torch.full((), _signed(part % 2**64), device=device)  # a copy to a GPU would wait for it
        key = _mix_((key + GOLDEN) ^ _mix_(part.to(torch.int64) + GOLDEN))
    return key


def bits(keys_N: Tensor, start: int, stop: int) -> Tensor:
    """N x (stop - start) int64, all 64 bits random: numbers start .. stop - 1 of each key."""
    counter = torch.arange(start + 1, stop + 1, device=keys_N.device) * GOLDEN
    return _mix_(keys_N[:, None] + counter)


def uniform(keys_N: Tensor, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """N x (stop - start) numbers in (0, 1), each rounded from 63 bits: small ones are as precise as large ones."""
    return _uniform_(bits(keys_N, start, stop), dtype)


def _uniform_(bits: Tensor, dtype: torch.dtype) -> Tensor:
    low = bits.bitwise_right_shift_(1).bitwise_and_(2**63 - 1)
    return low.to(dtype).mul_(2.0**-63).add_(2.0**-64).clamp_(max=1.0 - torch.finfo(dtype).eps / 2)


def lowest(value_BT: Tensor, count_B: Tensor) -> Tensor:
    """Which values are among the count lowest of their row; the first of equal ones."""
    return value_BT.argsort(dim=1, stable=True).argsort(1) < count_B[:, None]


def gumbel(keys_N: Tensor, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard Gumbel numbers -log(-log(1 - v)): the high ones, which decide, come from small v and are precise."""
    return negative_gumbel(keys_N, start, stop, dtype).neg_()


def negative_gumbel(keys_N: Tensor, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """-gumbel: who subtracts it passes over the numbers once less."""
    return _negative_gumbel_(uniform(keys_N, start, stop, dtype))


def gumbel_at(keys_N: Tensor, numbers_NS: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """As `gumbel`, of numbers of each key that are not in a row: numbers_NS[n, s] of key n."""
    return _negative_gumbel_(_uniform_(_mix_(keys_N[:, None] + (numbers_NS + 1) * GOLDEN), dtype)).neg_()


def _negative_gumbel_(u: Tensor) -> Tensor:
    return u.neg_().log1p_().neg_().log_()
