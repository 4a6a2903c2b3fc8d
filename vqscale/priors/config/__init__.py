"""The settings of priors, as frozen dataclasses that mirror the YAML, and of drawing from them. No torch here: --help
stays instant.

A prior has two dataclasses, and names both: what it is (its config, with the key `name`) and how it is sampled (its
SampleConfig), from which the programs that draw take their options. PRIORS is an open set of configs, and so are the
conditions (config_conditions.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self

from vqscale.codes.heads.config import FlatConfig, HeadConfig
from vqscale.config import Free, OneOf
from vqscale.config.schema import fields_of
from vqscale.nets.config.transformer import TransformerConfig
from vqscale.priors.config.conditions import ClassesConfig, ConditionConfig

Ramp = Literal["constant", "linear", "cosine"]

PRIORS = {
    "autoregressive": "vqscale.priors.config.autoregressive:AutoregressiveConfig",
    "masked": "vqscale.priors.config.masked:MaskedConfig",
    "coarse_to_fine": "vqscale.priors.config.coarse_to_fine:CoarseToFineConfig",
}


class Passes(NamedTuple):
    """What an image costs a prior, as plans count it."""

    network: float  # passes over all its tokens; those that come one by one, each once, are one pass
    asked: float  # tokens that the head is asked about


def switch(off: str) -> Any:
    """A field of a SampleConfig that is true unless the option --{off} is given. It changes how ids are computed and
    not which, so it is no dial.
    """
    return field(default=True, metadata={"off": off})


@dataclass(frozen=True)
class SampleConfig:
    """How ids are drawn from a prior, whatever images they are of; each prior has its own. Every field has a default.

    The fields are its dials, in the order of tables: a sweep turns the first fastest and draws curves over it.
    """

    def problems(self) -> Iterable[tuple[str, str]]:
        """(key, message) of all that no prior of this kind can do."""
        return ()

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Self:
        """What is said of samples, among other facts; a field that is not there is what it was before it was one."""
        return cls(**{key: facts.get(key, before) for key, before in cls.before().items()})

    @classmethod
    def before(cls) -> dict[str, Any]:
        """What each field means for samples that are older than it: its default, or what config.Before says."""
        kind: Any = cls
        return {key: one.before for key, one in fields_of(kind).items()}

    def as_begun(self, facts: Mapping[str, Any]) -> Self:
        """These settings, for samples that were begun with others, perhaps older than a field: where that is at its
        default here, and theirs is what it was before it was a field, it stays so."""
        usual = asdict(type(self)())
        kept = {key: was for key, was in self.before().items() if usual[key] == getattr(self, key)}
        return replace(self, **{key: was for key, was in kept.items() if facts.get(key, was) == was})

    @classmethod
    def dials(cls) -> tuple[str, ...]:
        """The fields that decide which ids are drawn."""
        return tuple(one.name for one in fields(cls) if "off" not in one.metadata)

    def unusual(self) -> dict[str, Any]:
        """The dials that are not at their default."""
        usual, chosen = asdict(type(self)()), asdict(self)
        return {dial: chosen[dial] for dial in self.dials() if chosen[dial] != usual[dial]}


@dataclass(frozen=True)
class GuidedSampleConfig(SampleConfig):
    """Of priors that can be guided: away from what they say of an image of which nothing is known."""

    guidance: float = 1.0
    """logits u + s (c - u), u those of the null condition: 1 is no guidance and costs nothing, 0 the null condition"""
    schedule: Ramp = "constant"
    """guidance at each step: the same at all, or from 1 at the first to its full value at the last"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if not self.guidance >= 0:
            yield "guidance", f"guidance is {self.guidance}: use 0 (the null condition), 1 (no guidance) or more"


@dataclass(frozen=True)
class RuleSampleConfig(GuidedSampleConfig):
    """Of priors that draw every id by one rule: guidance, then temperature, top-k, top-p."""

    temperature: float = 1.0
    """of the logits; 0 takes the likeliest id"""
    top_k: int = 0
    """draw from so many likeliest ids; 0 is all"""
    top_p: float = 1.0
    """draw from the likeliest ids that have this share together"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        yield from check_drawing(self.temperature, self.top_k, self.top_p)


def check_drawing(temperature: float, top_k: int, top_p: float, prefix: str = "") -> Iterable[tuple[str, str]]:
    """(key, message) of all that no id can be drawn with; the keys have a prefix."""
    if not temperature >= 0:
        yield f"{prefix}temperature", f"{prefix}temperature is {temperature}: use 0 (the likeliest id) or more"
    if top_k < 0:
        yield f"{prefix}top_k", f"{prefix}top_k is {top_k}: use at least 0"
    if not 0 < top_p <= 1:
        yield f"{prefix}top_p", f"{prefix}top_p is {top_p}: use a share above 0 and at most 1"


@dataclass(frozen=True)
class IdsConfig:
    """What every prior over a grid of ids has."""

    any_order: ClassVar[bool] = False
    """whether some ids can be given when the others are drawn"""

    num_codes: int | None = 16384
    """K, the number of codes of the tokenizer; null: as the token cache says"""
    num_ids: int | None = 1
    """ids per token, each one of num_codes: several with residual and grouped tokenizers; null: as the token cache
    says"""
    grid: tuple[int, ...] | None = (16, 16)
    """ids along each side: rows and columns of an image; one number for what has one side; null: as the token cache
    says"""
    condition: ConditionConfig = field(default_factory=ClassesConfig)
    """what the ids of an image are given: the tokens before the first id are made of it"""
    num_classes: int = 1000
    """classes of images: labels 0 .. num_classes - 1; 0 looks at no labels"""
    class_dropout: float = 0.1
    """share of images that are trained with the null class, which guidance needs; unknown labels have it too"""
    label_smoothing: float = 0.0
    """share of the uniform distribution in the targets, in training only"""
    z_loss: float = 0.0
    """weight of the squared log-normaliser, in training only; keeps logits near zero"""
    feature_dim: int | None = None
    """dimension of the tokenizer's codes, with head.embedding: codebook alone; null: as the tokenizer says"""
    head: HeadConfig = field(default_factory=FlatConfig)
    """embedding of the ids and logits over all of them; split over mesh.codes"""

    @property
    def num_tokens(self) -> int:
        """Ids of an image."""
        assert self.grid is not None, "grid is null: see nulls()"
        return math.prod(self.grid)

    @property
    def bound(self) -> str:
        """Why the nats of held-out ids are an upper bound of what the prior's own distribution has; "": they are exact,
        and all p(ids) add up to 1."""
        return ""

    def nulls(self) -> list[str]:
        """The keys that are still to be looked up in a token cache or a tokenizer (train/nulls.py)."""
        known = ["num_codes", "num_ids", "grid", *(["feature_dim"] if self.head.wants_features else [])]
        return [key for key in known if getattr(self, key) is None] + ["head.factors"] * self.head.wants_digits

    @property
    def wants_clusters(self) -> bool:
        """Whether the prior takes the clusters of the tokenizer's codes."""
        return False

    @property
    def transformers(self) -> dict[str, TransformerConfig]:
        """Those that see every token of an image, by name."""
        itself: Any = self
        return {"net": itself.net}

    def against(self, settings: SampleConfig) -> Iterable[tuple[str, str]]:
        """(key, message) of settings of its SampleConfig that a prior of this config cannot be sampled with."""
        return ()

    def problems(self) -> Iterable[tuple[str, str]]:
        for key, least in (("num_codes", 1), ("num_ids", 1), ("num_classes", 0)):
            number = getattr(self, key)
            if number is not None and number < least:
                yield key, f"{key} is {number}: use at least {least}"
        if self.grid is not None and min(self.grid, default=0) < 1:
            yield "grid", f"grid is {list(self.grid)}: give at least one side, and at least one id along each"
        if not 0 <= self.class_dropout < 1:
            yield "class_dropout", f"class_dropout is {self.class_dropout}: use a share from 0 to below 1"
        if not 0 <= self.label_smoothing < 1:
            yield "label_smoothing", f"label_smoothing is {self.label_smoothing}: use a share from 0 to below 1"
        if self.z_loss < 0:
            yield "z_loss", f"z_loss is {self.z_loss}, a weight: use 0 or more"
        if self.feature_dim is not None and not self.head.wants_features:
            yield (
                "feature_dim",
                f"feature_dim is {self.feature_dim}, and this head takes no vectors of codes: use null, "
                "or head.embedding: codebook",
            )
        yield from self.condition.misfits(self)
        if self.num_codes and self.num_ids:
            yield from ((f"head.{key}", text) for key, text in self.head.misfits(self.num_codes, self.num_ids))


def unturned(net: TransformerConfig, grid: tuple[int, ...] | None) -> Iterable[tuple[str, str]]:
    """(key, message) where the heads of a transformer cannot be turned over the sides of a grid."""
    pairs, sides = net.head_dim // 2, list(grid or ()) if net.rotary == "grid" else []
    if sides and pairs % len(sides):
        yield (
            "net.num_heads",
            f"a head of {net.head_dim} numbers (width / num_heads) has {pairs} pairs to turn, which do not "
            f"divide by the {len(sides)} sides of grid {sides}: change net.width or net.num_heads",
        )


@dataclass(frozen=True)
class ClusteredConfig(IdsConfig):
    """Of priors that know which codes belong together."""

    clusters: Free[str | None] = None
    """file of the clusters of the tokenizer's codes, which vqscale cluster writes; a run keeps those it began with"""
    num_clusters: int | None = None
    """clusters of codes; null: as the file says"""

    def nulls(self) -> list[str]:
        return [*super().nulls(), *(["num_clusters"] if self.wants_clusters and self.num_clusters is None else [])]

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if self.num_clusters is not None and not 1 <= self.num_clusters <= (self.num_codes or self.num_clusters):
            yield (
                "num_clusters",
                f"num_clusters is {self.num_clusters} and num_codes {self.num_codes}: each code is in one cluster, and "
                "none is empty; use at least 1, and at most num_codes",
            )


# The prior of a run is one of these.
if TYPE_CHECKING:
    from vqscale.priors.config.autoregressive import AutoregressiveConfig as PriorConfig
else:
    PriorConfig = OneOf(PRIORS)
