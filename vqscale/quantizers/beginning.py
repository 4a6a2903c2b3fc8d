"""How codes begin, told to whoever reads the log of a run: beforehand, what will not happen, and then what a fit did.

Numbers are of all ranks and the same on each. Where the codes go is not decided here: tables are filled by their upkeep
(codes/revival.py) and the table quantizers, latents are whitened by whitening.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vqscale.codes.codebook import Codebook
from vqscale.codes.revival import Filled
from vqscale.codes.rows import draw
from vqscale.quantizers.moments import BLOCK, RIDGE, moments, roots, spread


@dataclass(frozen=True)
class Fit:
    """What the codes saw of the latents when they were put there. A fit of whitening draws no rows."""

    tokens: int  # of all ranks
    dim: int
    rank: int  # directions in which these tokens vary, 0 where they are all the same
    condition: float  # the largest variance of a direction by the smallest
    drawn: int = 0  # rows that became tokens
    num_codes: int = 0  # rows that there are

    def numbers(self) -> dict[str, float]:
        """For the curves of a run."""
        drawn = {"drawn": self.drawn, "num_codes": self.num_codes} if self.num_codes else {}
        return {"tokens": self.tokens, "rank": self.rank, "condition": self.condition, **drawn}

    def __str__(self) -> str:
        seen = f"{self.tokens:,} tokens of all ranks"
        what = f"{self.drawn:,} rows drawn from {seen}" if self.num_codes else f"{seen} whitened, and so from here on"
        varied = f"these vary in {self.rank} of {self.dim} directions (condition {self.condition:.3g})"
        return "; ".join([what, varied, *self._fallen_back()])

    def _fallen_back(self) -> list[str]:
        """What stands in for tokens and directions that were not there."""
        told = []
        if self.drawn < self.num_codes:
            told.append(
                f"the other {self.num_codes - self.drawn:,} of {self.num_codes:,} rows had no token and are normal "
                "with the mean and covariance of those"
            )
        if self.rank == 0:
            told.append("latents are constant: all codes are the same point until latents differ")
        elif self.rank < self.dim and not self.num_codes:
            told.append(f"the other directions count as {RIDGE:g} of the mean variance")
        return told


def of_moments(mean_D: Tensor, covariance_DD: Tensor, tokens: int, filled: Filled | None = None) -> Fit:
    """The fit to tokens with these moments, of rows if some were filled."""
    rank, condition = spread(mean_D, covariance_DD)
    if filled is None:
        return Fit(tokens, len(mean_D), rank, condition)
    return Fit(tokens, len(mean_D), rank, condition, filled.drawn, filled.num_codes)


@torch.no_grad()
def fit_rows(codebook: Codebook, filled: Filled) -> tuple[Fit, Tensor, Tensor]:
    """(fit, mean_D, covariance_DD) of the rows that became tokens. Collective: D^2 + D + 1 numbers."""
    mean_D, covariance_DD = moments(codebook.rows[undrawn(codebook, filled) :], codebook.axis)
    return of_moments(mean_D, covariance_DD, filled.tokens, filled), mean_D, covariance_DD


def undrawn(codebook: Codebook, filled: Filled) -> int:
    """How many rows of this rank, its first ones, were left without a token: the last codes are drawn."""
    layout = codebook.layout
    return min(max(filled.num_codes - filled.drawn - layout.start, 0), layout.count)


@torch.no_grad()
def draw_beyond(codebook: Codebook, known: int, seed: int) -> None:
    """The rows of the codes from number `known` on become normal with the mean and covariance of those before them.
    Collective, and the same on any number of ranks."""
    layout = codebook.layout
    held = min(max(known - layout.start, 0), layout.count)
    mean_D, covariance_DD = moments(codebook.rows[:held], codebook.axis)
    root_DD = roots(covariance_DD)[0]
    drawn_kD = draw(layout, codebook.dim, "normal", 1.0, seed).to(codebook.rows.device)[held:]
    for rows_kD, unit_kD in zip(codebook.rows[held:].split(BLOCK), drawn_kD.split(BLOCK), strict=True):
        rows_kD.copy_(mean_D + unit_kD.double() @ root_DD)


def late(beginning: tuple[int, int], steps: int) -> list[str]:
    """What a run of so many steps should know beforehand if its codes begin, or land, after its end."""
    begin, landed = beginning
    if begin >= steps:
        return [
            f"warning: no step of this run trains with codes: they begin after a warm-up of {begin:,} steps "
            f"(warmup_steps), and run.steps is {steps:,}. Nothing is quantized in training, and held-out scores are of "
            f"first rows that nothing has learned; use a shorter warm-up, or raise run.steps above {begin:,} and go on"
        ]
    if landed >= steps:
        return [
            f"warning: codes do not land in this run: the decoder is given whole codes after step {landed:,} "
            f"(warmup_steps + landing_steps), and run.steps is {steps:,}. Held-out scores are of whole codes, which "
            f"training has not seen; use a shorter landing, or raise run.steps above {landed:,} and go on"
        ]
    return []
