"""The settings of quantizers without a table, whose codes are computed from their ids. No torch here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from vqscale.config import Before
from vqscale.quantizers.config import QuantizerSettings

MOST_BITS = 62  # ids and their arithmetic are int64

# The FSQ paper's table 1 and appendix A.4.1 (2^12 as in the main text), by the size that they come near.
LEVELS = {
    "fsq-2^4": (5, 3),
    "fsq-2^6": (8, 8),
    "fsq-2^8": (8, 6, 5),
    "fsq-2^9": (8, 8, 8),
    "fsq-2^10": (8, 5, 5, 5),
    "fsq-2^11": (8, 8, 6, 5),
    "fsq-2^12": (7, 5, 5, 5, 5),
    "fsq-2^14": (8, 8, 8, 6, 5),
    "fsq-2^16": (8, 8, 8, 5, 5, 5),
}


@dataclass(frozen=True)
class ImplicitConfig(QuantizerSettings):
    """What every quantizer without a table has."""

    window_decay: float | None = None
    """decay per step of the window in which usage is counted; null: a code used at its fair share has 5 hits in it;
    beyond 2^22 codes there is no window, every batch is counted for itself"""
    fit: Annotated[Literal["whiten", "none"], Before("none")] = "whiten"
    """whiten: latents have mean 0 and covariance 1 over all ranks in every training step, so that codes that stand
    still are where latents are; none is the published form"""
    whiten_decay: float = 0.95
    """decay per step of the running mean and covariance, which evaluation whitens by"""
    whiten_gradient: bool = True
    """gradients pass through mean and covariance of a step, which holds the scale of latents"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if not 0 <= self.whiten_decay < 1:
            yield "whiten_decay", f"whiten_decay is {self.whiten_decay}: use a number from 0 to below 1"
        if self.window_decay is not None and not 0 <= self.window_decay < 1:
            yield "window_decay", f"window_decay is {self.window_decay}: use a number from 0 to below 1"


@dataclass(frozen=True)
class FSQConfig(ImplicitConfig):
    """Finite scalar quantization: every channel is bounded and rounded to one of its levels. No losses."""

    module: ClassVar[str] = "vqscale.quantizers.fsq:FSQ"
    name: Literal["fsq"] = "fsq"
    """rounded channels, no learned codes"""
    levels: tuple[int, ...] | str | None = None
    """levels of each channel, e.g. [8, 5, 5, 5], or the name of a recommended list: fsq-2^4 to fsq-2^16"""
    num_codes: int | None = None
    """instead of levels: the power of two that a recommended list comes near; null with null levels: 4096"""
    shift: Literal["atanh", "tan"] = "atanh"
    """how an even number of levels is centred: atanh, or tan as in the paper (its author's mistake, barely felt)"""
    eps: float = 1e-3
    """h = (L - 1) (1 - eps) / 2 bounds a channel; -1e-3 is what some other code does"""
    symmetric: bool = False
    """codes evenly spaced on [-1, 1] with both ends (arXiv 2411.19842); shift and eps are not used"""

    def channels(self) -> tuple[int, ...]:
        """The levels of each channel; dim is their number, num_codes their product."""
        if isinstance(self.levels, tuple):
            return self.levels
        return LEVELS[self._list_name()]

    def _list_name(self) -> str:
        size = 4096 if self.num_codes is None else self.num_codes
        return self.levels if isinstance(self.levels, str) else f"fsq-2^{math.log2(max(size, 1)):g}"

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if self.levels is not None and self.num_codes is not None:
            yield "num_codes", f"levels {self.levels} and num_codes {self.num_codes} are both given: keep one of them"
            return
        if not isinstance(self.levels, tuple) and self._list_name() not in LEVELS:
            names = ", ".join(f"{name} = {list(levels)}" for name, levels in LEVELS.items())
            key, found = ("levels", self.levels) if self.num_codes is None else ("num_codes", str(self.num_codes))
            yield key, f"{found} is no list of levels that has a name: write levels as [8, 5, 5, 5], or take {names}"
            return
        levels = self.channels()
        low = [number for number in levels if number < 2]
        if not levels or low:
            found = f"there are {low[0]} in {list(levels)}" if low else "the list is empty"
            yield "levels", f"every channel has at least 3 levels (2 with symmetric: true), but {found}: write more"
            return
        if math.prod(levels) > 2**MOST_BITS:
            bits = math.log2(math.prod(levels))
            yield "levels", f"{list(levels)} has 2^{bits:.1f} codes, and ids end at 2^{MOST_BITS}: use fewer channels"
        if self.symmetric:
            return
        if 2 in levels:
            yield (
                "levels",
                f"a channel of 2 levels in {list(levels)} cannot be centred, its shift would be infinite: "
                "use 3 levels or more, or symmetric: true",
            )
        if abs(self.eps) * (max(levels) - 1) >= 1:
            yield (
                "eps",
                f"eps {self.eps} moves the bound of the {max(levels)} levels in {list(levels)} past the outermost of "
                f"them: use less than 1 / {max(levels) - 1}, in size",
            )


@dataclass(frozen=True)
class BitsConfig(ImplicitConfig):
    """What quantizers whose codes are bits have: one bit for each of `dim` channels, num_codes = 2^dim."""

    num_codes: int | None = None
    """K, a power of two; null is 2^dim"""
    dim: int | None = None
    """D, the bits of an id; null is log2 of num_codes, and 16 where that is null too"""
    entropy_weight: float = 0.1
    """weight of mean entropy per token minus diversity_weight x entropy of the mean probability; 0 is off"""
    diversity_weight: float = 1.0
    """what the entropy of the mean probability, of all ranks, counts beside the entropy per token"""
    group_bits: int = 18
    """bits whose mean probability is taken jointly, 2^group_bits numbers: exact for dim up to this, a bound beyond"""

    def bits(self) -> int:
        """D."""
        if self.dim is not None:
            return self.dim
        return 16 if self.num_codes is None else self.num_codes.bit_length() - 1

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        codes, bits = self.num_codes, self.bits()
        if self.dim is not None and not 1 <= bits <= MOST_BITS:
            yield "dim", f"dim is {bits}, and an id has 1 to {MOST_BITS} bits: change dim"
        elif codes is not None and (codes < 2 or codes.bit_count() != 1):
            yield "num_codes", f"num_codes {codes} is no power of two, and codes are bits: use {_near(codes)}"
        elif codes is not None and codes != 2**bits:
            yield (
                "num_codes",
                f"num_codes {codes} is 2^{codes.bit_length() - 1}, but dim is {bits}: set num_codes: {2**bits}, "
                f"or dim: {codes.bit_length() - 1}, or leave one of them out",
            )
        elif codes is not None and codes > 2**MOST_BITS:
            yield "num_codes", f"num_codes {codes} is past the last id, 2^{MOST_BITS}: use at most that"
        if not 1 <= self.group_bits <= 24:
            yield "group_bits", f"group_bits is {self.group_bits}, and 2^group_bits numbers are held: use 1 to 24"


def _near(num_codes: int) -> str:
    """The powers of two on both sides of a number that is none, from 2 on."""
    below = 1 << max(num_codes.bit_length() - 1, 0)
    return "2" if below < 2 else f"{below} (dim {below.bit_length() - 1}) or {2 * below} (dim {below.bit_length()})"


@dataclass(frozen=True)
class LFQConfig(BitsConfig):
    """Lookup-free quantization (MAGVIT-v2): the signs of the channels."""

    module: ClassVar[str] = "vqscale.quantizers.lfq:LFQ"
    name: Literal["lfq"] = "lfq"
    """signs of channels, no learned codes"""
    commitment_weight: float = 0.25
    """weight of |x - sign(x)|^2"""
    entropy_temperature: float = 0.01
    """temperature T of the entropies: softmax of 2 x.c / T over all codes c"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        yield from _temperature(self.entropy_temperature)


@dataclass(frozen=True)
class BSQConfig(BitsConfig):
    """Binary spherical quantization: the signs of a token on the unit sphere."""

    module: ClassVar[str] = "vqscale.quantizers.bsq:BSQ"
    name: Literal["bsq"] = "bsq"
    """signs on the unit sphere, no learned codes"""
    commitment_weight: float = 0.25
    """weight of |u - u_q|^2, from 0 to below 2 for each token (0 in the released configs)"""
    entropy_temperature: float = 1.0
    """temperature T of the entropies: softmax of 2 u.c / T over all codes c"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        yield from _temperature(self.entropy_temperature)


def _temperature(value: float) -> Iterable[tuple[str, str]]:
    if value <= 0:
        yield "entropy_temperature", f"entropy_temperature is {value}: use a positive number"
