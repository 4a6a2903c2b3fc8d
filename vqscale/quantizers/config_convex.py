"""The settings of the quantizer whose output is a convex combination of codes. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from vqscale.codes.config import TableConfig


@dataclass(frozen=True)
class SCQConfig(TableConfig):
    """Soft convex quantization: a sparse convex combination of codes. Continuous: ids say less than its output."""

    name: Literal["scq"] = "scq"
    """convex combination of codes near the nearest one; its output is continuous, decode(ids) is not it"""
    solver: Literal["exact", "relaxed"] = "exact"
    """exact: the constrained minimum; relaxed: unconstrained, then projected, which is another point for small lam"""
    lam: float = 0.1
    """weight of |P - onehot|^2 beside |x - C P|^2: small is the convex hull, large is the nearest code"""
    quantization_weight: float = 1.0
    """weight of |x - z|^2, whose gradient goes to the encoder and the rows"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if self.lam <= 0:
            yield (
                "lam",
                f"lam is {self.lam}, and without |P - onehot|^2 many combinations are equally good: use a positive "
                "number (0.001 is nearly the projection on the convex hull)",
            )
