"""Priors: models of the ids of images, one file each, one interface (base.py); they end in a head of codes/heads.

To add one: a file here, its config and its SampleConfig (without torch, in config/), and its line in PRIORS.
Programs, tables and pages take what they offer from these; the tests run over the dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vqscale import config as configuration
from vqscale.priors.config import PRIORS, PriorConfig, SampleConfig

if TYPE_CHECKING:
    from vqscale.parallel.mesh import Mesh
    from vqscale.priors.base import Prior

__all__ = ["PRIORS", "Prior", "build", "sampling"]


def build(config: Mapping[str, Any] | PriorConfig, mesh: Mesh | None = None, *, seed: int = 0) -> Prior:
    """The prior of a config, e.g. {"name": "autoregressive", "num_codes": 4096, "grid": [8, 8]}, on the mesh's device;
    no mesh is one process. Its first values do not depend on the number of processes.

    Raises ConfigError (a ValueError) that lists all problems of a dict, the nearest known key of each unknown one.
    """
    if isinstance(config, Mapping):
        parsed: PriorConfig = configuration.parse(PriorConfig, config, source="prior")
        return build(parsed, mesh, seed=seed)
    if nulls := config.nulls():
        text = "null is as a token cache or a tokenizer says (so is own), and only `vqscale train` looks: give a value"
        raise configuration.ConfigError([f"prior: {key}: {text}" for key in nulls])
    import torch

    from vqscale.seed import derive

    torch.manual_seed(derive(seed, "prior"))
    prior: Prior = configuration.load_class(config.module)(config, mesh, seed=seed)
    return prior


def sampling(name: str) -> type[SampleConfig]:
    """How the prior of this name is sampled."""
    kind: type[SampleConfig] = configuration.load_class(PRIORS[name]).sampling
    return kind


def __getattr__(name: str) -> Any:
    if name == "Prior":
        from vqscale.priors.base import Prior

        return Prior
    raise AttributeError(f"module 'vqscale.priors' has no attribute {name!r}; it has Prior, PRIORS and build")
