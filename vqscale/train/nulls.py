"""Keys of a prior's config that are null because others know them: num_codes, num_ids and grid the token cache,
feature_dim the tokenizer, num_clusters the file of its clusters. They are filled before any process group is made, so
that run.yaml says what was used, and a run that goes on is compared by it.

Not here: whether keys that were given agree with the cache (train/prior.py, when it is opened).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vqscale import config as configuration
from vqscale.tokenizer.clusters import read_card
from vqscale.train.config_prior import PriorRun

if TYPE_CHECKING:
    from vqscale.data.tokens.format import Card


def fill(config: PriorRun) -> PriorRun:
    """The config with a value for each of these keys that is null, the config itself where none is. ValueError where
    there is nothing to look it up in, or where what is found does not fit the rest (ConfigError)."""
    keys = config.prior.nulls()
    found: dict[str, Any] = {}
    if of_cache := [key for key in keys if key in ("num_codes", "num_ids", "grid")]:
        card = _card(config, of_cache)
        found = {"num_codes": card.num_codes, "num_ids": card.num_ids, "grid": list(card.grid)}
    if "feature_dim" in keys and config.tokenizer is not None:
        found["feature_dim"] = _code_dim(config.tokenizer)
    if "num_clusters" in keys and config.prior.clusters is not None:
        found["num_clusters"] = read_card(config.prior.clusters).num_clusters
    if not keys:
        return config
    whole = configuration.to_dict(config)
    whole["prior"] |= {key: found[key] for key in keys}
    return configuration.parse(PriorRun, whole, source="with what the token cache and the tokenizer say")


def _card(config: PriorRun, keys: list[str]) -> Card:
    from vqscale.data.tokens.format import read_card

    path = config.data.train.path
    card = read_card(Path(path).expanduser())
    if card is None:
        names = " and ".join(f"prior.{key}" for key in keys)
        raise ValueError(
            f"null for {names} is as the token cache in data.train.path says, and there is none in {path} (no "
            f"card.json): encode one there first, give another path, or give {names}"
        )
    return card


def _code_dim(path: str) -> int:
    """The dimension of the codes of the tokenizer in a folder."""
    import torch

    from vqscale import quantizers
    from vqscale.parallel.mesh import Mesh
    from vqscale.tokenizer import saved

    try:
        config = saved.config_of(path)
    except ValueError as error:
        raise ValueError(
            f"prior.feature_dim is null, which is as the folder in the key tokenizer says: {error}; or give "
            "prior.feature_dim"
        ) from error
    with torch.device("meta"):
        return quantizers.build(config.quantizer, Mesh(device="meta")).dim
