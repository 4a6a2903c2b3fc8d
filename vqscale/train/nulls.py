"""Keys of a prior's config that are null because others know them: num_codes, num_ids and grid the token cache, or the
tokenizer that encodes; feature_dim the tokenizer, num_clusters the file of its clusters; so are head.factors where they
are the ids' own, and head.neighbours, which follows from the number of codes. They are filled before any process group
is made, so that run.yaml says what was used, and a run that goes on is compared by it.

Not here: whether keys that were given agree with these (prior_data.py, when they are opened).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vqscale import config as configuration
from vqscale.codes.heads.config import FlatConfig
from vqscale.data.config_tokens import TokensConfig
from vqscale.nets.config import NetConfig, grid
from vqscale.priors.config.autoregressive import AutoregressiveConfig
from vqscale.tokenizer.clusters import read_card
from vqscale.train.config.prior import PriorRun

if TYPE_CHECKING:
    from vqscale.data.tokens.format import Card
    from vqscale.tokenizer.config import TokenizerConfig


MANY_CODES, NEIGHBOURS = 2**16, 8  # from so many codes on targets are shared; measured with configs/study/heads_65536


def fill(config: PriorRun) -> PriorRun:
    """The config with a value for each of these keys that is null, the config itself where none is. ValueError where
    there is nothing to look it up in, or where what is found does not fit the rest (ConfigError)."""
    keys = config.prior.nulls()
    found: dict[str, Any] = {}
    if of_cache := [key for key in keys if key in ("num_codes", "num_ids", "grid", "head.factors")]:
        if isinstance(config.data.train, TokensConfig):
            card = _card(config.data.train.path, of_cache)
            found = {"num_codes": card.num_codes, "num_ids": card.num_ids, "grid": list(card.grid)}
            found["head.factors"] = list(card.digits)
        elif config.tokenizer is not None:
            made = of_tokenizer(config)
            found = made.ids | {"head.factors": list(made.digits)}
    if "feature_dim" in keys and config.tokenizer is not None:
        found["feature_dim"] = _code_dim(config.tokenizer)
    if "num_clusters" in keys and config.prior.clusters is not None:
        found["num_clusters"] = read_card(config.prior.clusters).num_clusters
    if not keys:
        return _sharing(config)
    if "head.factors" in keys and not found.get("head.factors"):
        raise ValueError(
            "prior.head.factors is own, and the token cache or the tokenizer says of no digits of ids: they are "
            "numbers of rows, or the cache is older than this key; give the factors, as [64, 64]"
        )
    whole = configuration.to_dict(config)
    for key in keys:
        part, _, last = key.rpartition(".")
        (whole["prior"][part] if part else whole["prior"])[last] = found[key]
    return _sharing(configuration.parse(PriorRun, whole, source="with what the token cache and the tokenizer say"))


def _sharing(config: PriorRun) -> PriorRun:
    """With the neighbours of flat heads that are null: none where no study has asked, as of other priors."""
    prior = config.prior
    heads = {name: getattr(prior, name, None) for name in ("head", "coarse_head")}
    open_heads = {name: x for name, x in heads.items() if isinstance(x, FlatConfig) and x.neighbours is None}
    if not open_heads:
        return config
    asked = isinstance(prior, AutoregressiveConfig) and prior.head.wants_features and not prior.cluster_weight
    many = prior.num_codes is not None and prior.num_codes >= MANY_CODES
    found: dict[str, Any] = {
        name: replace(x, neighbours=NEIGHBOURS if asked and many else 0) for name, x in open_heads.items()
    }
    return replace(config, prior=replace(prior, **found))


class Made(NamedTuple):
    """What a tokenizer makes of the samples of a run, by its config alone."""

    ids: dict[str, Any]
    """num_codes, num_ids, grid"""
    takes_context: bool
    digits: tuple[int, ...]


def of_tokenizer(config: PriorRun) -> Made:
    """What the tokenizer of a run makes of the samples of data.train. ValueError where it can make nothing of them."""
    from vqscale.tokenizer import saved

    source, path = config.data.train, config.tokenizer
    assert path is not None, "the config says that shards want a tokenizer"
    assert not isinstance(source, TokensConfig), "a cache says itself what its ids are"
    found = saved.config_of(path)
    if source.kind not in found.signal.media:
        raise ValueError(
            f"the tokenizer in {path} is of {found.signal.name}, made of {' or '.join(found.signal.media)}, and "
            f"data.train has shards of {source.kind}: change data.train.medium, or give another tokenizer"
        )
    return made_of(without_codes(found), found.net, source.sides)


def made_of(quantizer: Any, net: NetConfig, sides: tuple[int, ...]) -> Made:
    """What a quantizer and a net make of samples with these sides."""
    ids = {"num_codes": quantizer.num_codes, "num_ids": quantizer.num_ids, "grid": list(grid(net, sides))}
    return Made(ids, net.takes_context, quantizer.digits or ())


def _card(path: str, keys: list[str]) -> Card:
    from vqscale.data.tokens.format import read_card

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
    from vqscale.tokenizer import saved

    try:
        config = saved.config_of(path)
    except ValueError as error:
        raise ValueError(
            f"prior.feature_dim is null, which is as the folder in the key tokenizer says: {error}; or give "
            "prior.feature_dim"
        ) from error
    return int(without_codes(config).dim)


def without_codes(config: TokenizerConfig) -> Any:
    """The quantizer of a tokenizer's config, without its codes."""
    import torch

    from vqscale import quantizers
    from vqscale.parallel.mesh import Mesh

    with torch.device("meta"):
        return quantizers.build(config.quantizer, Mesh(device="meta"))
