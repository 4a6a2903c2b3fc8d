"""What a run may be asked for: one YAML file is one of these. The keys of each task are in the files named after it."""

from __future__ import annotations

from vqscale.train.config.prior import PriorRun
from vqscale.train.config.tokenizer import TokenizerRun

__all__ = ["PriorRun", "Run", "TokenizerRun"]

# `task` tells which.
Run = TokenizerRun | PriorRun
