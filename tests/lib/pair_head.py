"""A second head in one file, as somebody would add it: an id is two digits, each with a flat head of its own.

p(id | h) = p(high | h) p(low | h), with id = high * lows + low.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from vqscale.codes import noise
from vqscale.codes.heads.base import Losses, Scored, Vocabulary
from vqscale.codes.heads.config import HeadSettings
from vqscale.codes.heads.flat import Head
from vqscale.seed import derive

LINE = {"pair": f"{__name__}:PairConfig"}  # of HEADS


@dataclass(frozen=True)
class PairConfig(HeadSettings):
    """Two digits."""

    module: ClassVar[str] = f"{__name__}:Pair"
    name: Literal["pair"] = "pair"
    """which head"""
    lows: int = 4
    """values of the low digit; num_codes is a multiple of it"""


class Pair(Vocabulary):
    def __init__(self, config, num_codes, dim, mesh, seed):
        super().__init__()
        self.num_codes, self.dim, self.lows = num_codes, dim, config.lows
        self.high = Head(num_codes // config.lows, dim, mesh, seed=derive(seed, "high"), scan_mib=config.scan_mib)
        self.low = Head(config.lows, dim, mesh, seed=derive(seed, "low"), scan_mib=config.scan_mib)

    @classmethod
    def from_config(cls, config, num_codes, dim, mesh, *, seed, feature_dim=None, num_ids=1):
        return cls(config, num_codes, dim, mesh, seed)

    def digits(self, ids, nobody=-1):
        """(high, low); `nobody` stays what it is."""
        low = torch.where(ids == nobody, nobody, ids % self.lows)
        return torch.where(ids == nobody, nobody, ids.div(self.lows, rounding_mode="floor")), low

    def embed(self, ids):
        high, low = self.digits(ids)
        return self.high.embed(high) + self.low.embed(low)

    def losses(self, h_ND, targets_N, *, label_smoothing=0.0, z_loss=0.0, ignore=-1, right=False):
        parts = [
            head.losses(h_ND, digit_N, label_smoothing=label_smoothing, z_loss=z_loss, ignore=ignore, right=right)
            for head, digit_N in zip((self.high, self.low), self.digits(targets_N, ignore), strict=True)
        ]
        both = parts[0].right_N & parts[1].right_N if right else None
        return Losses(*(one + other for one, other in zip(parts[0][:3], parts[1][:3], strict=True)), both)

    def drawn(self, h_ND, keys_N, rule, unguided_ND, guidance, scored):
        high_N, log_high_N = self.high.drawn(h_ND, noise.keys(0, keys_N), rule, unguided_ND, guidance, scored)
        low_N, log_low_N = self.low.drawn(h_ND, noise.keys(1, keys_N), rule, unguided_ND, guidance, scored)
        return Scored(high_N * self.lows + low_N, log_high_N + log_low_N)


def register():
    """What the line in HEADS does, in a process of its own."""
    from vqscale.codes.heads import HEADS

    HEADS.update(LINE)
