"""Priors: models of the ids of images, one file each, one interface (base.py); they end in codes.Head.

To add one: a file here, its settings in config.py, and its line in PRIORS. The tests run over this dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from vqscale import config as configuration
from vqscale.priors.config import PriorConfig

if TYPE_CHECKING:
    from vqscale.parallel.mesh import Mesh
    from vqscale.priors.base import Prior

PRIORS = {"autoregressive": "vqscale.priors.autoregressive:Autoregressive"}


def build(config: Mapping[str, Any] | PriorConfig, mesh: Mesh | None = None, *, seed: int = 0) -> Prior:
    """The prior of a config, e.g. {"name": "autoregressive", "num_codes": 4096, "grid": [8, 8]}, on the mesh's device;
    no mesh is one process. Its first values do not depend on the number of processes.

    Raises ConfigError (a ValueError) that lists all problems of a dict, the nearest known key of each unknown one.
    """
    if isinstance(config, Mapping):
        parsed: PriorConfig = configuration.parse(PriorConfig, config, source="prior")
        return build(parsed, mesh, seed=seed)
    import torch

    from vqscale.seed import derive

    module, name = PRIORS[config.name].split(":")
    torch.manual_seed(derive(seed, "prior"))
    prior: Prior = getattr(import_module(module), name)(config, mesh, seed=seed)
    return prior


def __getattr__(name: str) -> Any:
    if name == "Prior":
        from vqscale.priors.base import Prior

        return Prior
    raise AttributeError(f"module 'vqscale.priors' has no attribute {name!r}; it has Prior, PRIORS and build")
