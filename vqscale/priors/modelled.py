"""What a prior says of a batch of ids: a loss to be minimised, nats of images, and what is shown of them.

Made of what a head says of the positions of the batch (codes/heads/base.py). Not here: which positions these are
(positions.py), and what their losses are (base.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from vqscale.codes import tally
from vqscale.codes.heads.base import Losses
from vqscale.priors.positions import Positions


@dataclass
class Modelled:
    """What a prior says of a batch of ids."""

    loss: Tensor  # to be minimised: a mean over this rank's tokens
    nats_B: Tensor  # of each image, the mean nats of a token; no gradient. In evaluation mode the loss is their mean.
    # They are exact, or an estimate of an upper bound where the prior's config says `bound`.
    # The rest is shown and trains nothing; it is there while tally.statistics are on.
    right_B: Tensor | None = None  # of each image, the share of ids that were the most probable; in evaluation mode
    parts: dict[str, Tensor] = field(default_factory=dict)  # of the loss, by name; cross_entropy of the ids is one
    stats: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, losses: Losses, at: Positions, z_loss: float, mean: Tensor | None = None) -> Modelled:
        """`mean` is that of the losses, where it alone has a gradient. Nothing is sent."""
        mean = at.mean(losses.whole_N) if mean is None else mean
        found = cls(mean, at.means_of_images(losses.whole_N.detach()))
        if not tally.statistics.on:
            return found
        found.parts["cross_entropy"] = at.mean(losses.cross_entropy_N)
        if z_loss:
            found.parts["z_loss"] = z_loss * at.mean(losses.square_N)
        if losses.right_N is not None:
            found.right_B = at.means_of_images(losses.right_N.double())
        return found
