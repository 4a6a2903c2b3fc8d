"""What every quantizer is tested with: a case for each name of QUANTIZERS, more where its settings have branches."""

from __future__ import annotations

import torch

from vqscale import quantizers
from vqscale.config.schema import classes_of, fields_of, named
from vqscale.quantizers import QUANTIZERS
from vqscale.quantizers.base import Quantizer
from vqscale.quantizers.config import QuantizerConfig

K, DIM, TOKENS = 13, 4, 24
TABLE = {"num_codes": K, "dim": DIM, "init": "normal"}  # given to those that have such settings and do not fix them
# Quantizers that this is not enough for.
OWN = {
    "fsq": {"levels": [5, 4, 3, 3]},
    "lfq": {"num_codes": 2**DIM, "entropy_weight": 0.1, "entropy_temperature": 1.0},
    "bsq": {"num_codes": 2**DIM, "entropy_weight": 0.1},
    "ema": {"decay": 0.8},
    "residual": {"levels": 2, "inner": {"name": "ibq", **TABLE}},
    "grouped": {"groups": 2, "inner": {"name": "vq", **TABLE, "dim": 2}},
}
VARIANTS = {
    "vq cosine": {"name": "vq", "similarity": "cosine", "commitment_weight": 0.5},
    "ibq entropy": {"name": "ibq", "entropy_weight": 0.1, "entropy_temperature": 0.5, "temperature": 0.7},
    "ibq euclid": {"name": "ibq", "similarity": "euclid", "entropy_weight": 0.1, "entropy_temperature": 0.5},
    "fsq symmetric": {"name": "fsq", "levels": [2, 4, 3, 8], "symmetric": True},
    "lfq groups": {"name": "lfq", "num_codes": None, "entropy_weight": 0.1, "group_bits": 3},
    "simvq no bias": {"name": "simvq", "bias": False, "quantizer_weight": 2.0},
    "scq relaxed": {"name": "scq", "solver": "relaxed", "lam": 1.0},
}
CASES = [*QUANTIZERS, *VARIANTS]


def settings(case: str, **others) -> dict:
    """The settings of a case, or of a quantizer that is no case yet; `others` to those that have them."""
    own = VARIANTS.get(case) or {"name": case, **OWN.get(case, {})}
    known = set(fields_of(named(classes_of(QuantizerConfig))[1][own["name"]]))
    if own["name"] == "fsq":
        known.remove("num_codes")  # its levels say it
    return {key: value for key, value in (TABLE | others).items() if key in known} | own


def built(case: str, mesh=None, *, seed: int = 3, **others) -> Quantizer:
    torch.manual_seed(seed)  # for what is not a table
    return quantizers.build(settings(case, **others), mesh, seed=seed)


WITH_TABLE = [case for case in CASES if hasattr(built(case), "upkeep")]
FROM_DATA = [case for case in WITH_TABLE if hasattr(built(case).config, "init")]
SINGLE = [case for case in CASES if built(case).num_ids == 1]
