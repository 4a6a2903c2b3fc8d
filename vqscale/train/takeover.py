"""Tells of a discriminator that has taken over, from the rows that are logged.

It is sure when its loss has fallen below a tenth of what one has that cannot tell samples from reconstructions: then
what it teaches is how to deceive it, or nothing. It outweighs when its gradient at the decoder's last layer is longer
than that of all other losses together. Either is told when it has lasted for ten logged steps, and again when it comes
back after it was over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from vqscale.train.config.losses import AdversarialConfig

ROWS = 10
SURE = 0.1
OUTWEIGHS = 1.0
UNDECIDED = {"hinge": 1.0, "nonsaturating": math.log(2), "least_squares": 0.25}
"""the least loss of a discriminator that gives all one answer"""
REMEDY = (
    "begin a new run from this one (init.from, parts with discriminator) with a smaller loss.adversarial.optim.lr, a "
    "greater lecam_weight"
)


class Takeover:
    def __init__(self, config: AdversarialConfig) -> None:
        self._undecided: dict[str, float] = {}
        for each in config.objectives:
            kind, value = each.discriminator, each.discriminator_weight * UNDECIDED[each.discriminator]
            self._undecided[kind] = self._undecided.get(kind, 0.0) + value
        self._lasted = {"sure": 0, "outweighs": 0}

    def notes(self, step: int, row: Mapping[str, float]) -> list[str]:
        """What to say after a logged step; nothing of steps in which the discriminator does not train."""
        losses = [row.get(f"discriminator/{kind}") for kind in self._undecided]
        found = [x for x in losses if x is not None]
        if len(found) < len(losses):
            return []
        share = sum(found) / sum(self._undecided.values())
        ratio = row.get("discriminator/gradient_ratio", 0.0)
        real, fake = (row[f"discriminator/{what}"] for what in ("real", "fake"))
        said = []
        if self._for_long("sure", share < SURE):
            said.append(
                f"warning: up to step {step} the discriminator was sure for {ROWS} logged steps (its loss is "
                f"{share:.1%} of an undecided one's; answers to samples {real:.2f}, to reconstructions {fake:.2f}): "
                f"{REMEDY}, or a later start_step"
            )
        if self._for_long("outweighs", ratio > OUTWEIGHS):
            said.append(
                f"warning: up to step {step} the discriminator's gradient at the decoder's last layer was longer than "
                f"that of all other losses for {ROWS} logged steps (now {ratio:.2f} times): {REMEDY}, a smaller "
                "weight, or adaptive: true"
            )
        return said

    def _for_long(self, what: str, now: bool) -> bool:
        """Whether it has just lasted for as many rows as it takes."""
        self._lasted[what] = self._lasted[what] + 1 if now else 0
        return self._lasted[what] == ROWS
