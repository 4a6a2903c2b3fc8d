"""How guidance changes over the steps in which an image is drawn. Not here: what it leads away from (base.py)."""

from __future__ import annotations

import math

from vqscale.priors.config import Ramp


def guidance_scales(scale: float, schedule: Ramp, steps: int) -> list[float]:
    """The scale at each of `steps` steps: the same at all, or from 1 at the first to `scale` at the last.

    linear   1 + (scale - 1) i / (steps - 1)         cosine   1 + (scale - 1) (1 - cos(pi i / (steps - 1))) / 2
    """
    ramps = {
        "constant": lambda t: 1.0,
        "linear": lambda t: t,
        "cosine": lambda t: (1.0 - math.cos(math.pi * t)) / 2.0,
    }
    if schedule not in ramps:
        raise ValueError(f"schedule is {schedule!r}, a setting of sample: choose one of {', '.join(ramps)}")
    return [1.0 + (scale - 1.0) * ramps[schedule](i / max(1, steps - 1)) for i in range(steps)]
