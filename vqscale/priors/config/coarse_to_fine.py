"""The settings of coarse-to-fine prediction, and of drawing from it; see __init__.py for what these are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from vqscale.codes.heads.config import FlatConfig, HeadConfig
from vqscale.nets.config.transformer import TransformerConfig
from vqscale.priors.config import ClusteredConfig, SampleConfig, check_drawing, unturned
from vqscale.priors.config.autoregressive import AutoregressiveConfig, AutoregressiveSampleConfig

STAGES: Mapping[str, tuple[str, ...]] = {  # the dials of each
    "coarse": ("guidance", "schedule", "temperature", "top_k", "top_p"),
    "fine": ("fine_guidance", "fine_temperature", "fine_top_k", "fine_top_p"),
}


@dataclass(frozen=True)
class CoarseToFineSampleConfig(AutoregressiveSampleConfig):
    """Drawing the coarse ids one by one as an autoregressive prior does, then all fine ids in one pass: guidance, then
    temperature, top-k, top-p of its own."""

    fine_guidance: float = 1.0
    """guidance of the fine ids, which the coarse ones decide already: 1 costs nothing"""
    fine_temperature: float = 1.0
    """of the logits of fine ids; 0 takes the likeliest, which makes images worse"""
    fine_top_k: int = 0
    """draw fine ids from so many likeliest ones; 0 is all"""
    fine_top_p: float = 1.0
    """draw fine ids from the likeliest ones that have this share together"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if not self.fine_guidance >= 0:
            yield "fine_guidance", f"fine_guidance is {self.fine_guidance}: use 0 (the null condition), 1 or more"
        yield from check_drawing(self.fine_temperature, self.fine_top_k, self.fine_top_p, "fine_")


@dataclass(frozen=True)
class CoarseToFineConfig(ClusteredConfig):
    """The clusters of the ids one after the other, then all ids at once given the clusters, as CTF does."""

    module: ClassVar[str] = "vqscale.priors.coarse_to_fine:CoarseToFine"
    sampling: ClassVar[type[SampleConfig]] = CoarseToFineSampleConfig
    name: Literal["coarse_to_fine"] = "coarse_to_fine"
    """which prior"""
    stages: Literal["both", "coarse", "fine"] = "both"
    """which are there and trained; where one is not, what it would say is uniform. Join two runs to have both"""
    support: Literal["cluster", "all"] = "cluster"
    """fine ids are members of their cluster, or any; with all, nats are those of the pair (coarse, fine), a bound"""
    fine_condition: bool = True
    """the second stage knows the condition; false: the coarse ids alone"""
    coarse_noise: float = 0.0
    """share of the coarse ids that the second stage is shown at random in training, for it meets drawn ones later"""
    net: TransformerConfig = field(default_factory=TransformerConfig)
    """the transformer of the coarse ids"""
    fine_net: TransformerConfig = field(default_factory=TransformerConfig)
    """the transformer of the fine ids; every token sees all"""
    head: HeadConfig = field(default_factory=lambda: FlatConfig(embedding="tied", init_scale=0.0))
    """logits of the fine ids, flat; tied, for fine ids are not embedded"""
    coarse_head: HeadConfig = field(default_factory=FlatConfig)
    """embedding of the coarse ids and logits over them"""

    @property
    def bound(self) -> str:
        return "each id counts with its own cluster, and others may give it too" if self.support == "all" else ""

    @property
    def wants_clusters(self) -> bool:
        return True

    @property
    def transformers(self) -> dict[str, TransformerConfig]:
        """Those that are there, by stage."""
        both = {"coarse": self.net, "fine": self.fine_net}
        return {stage: net for stage, net in both.items() if self.stages in ("both", stage)}

    def coarse(self) -> AutoregressiveConfig:
        """The prior of the first stage, whose ids are clusters."""
        return AutoregressiveConfig(
            num_codes=self.num_clusters,
            grid=self.grid,
            condition=self.condition,
            num_classes=self.num_classes,
            class_dropout=self.class_dropout,
            label_smoothing=self.label_smoothing,
            z_loss=self.z_loss,
            head=self.coarse_head,
            net=self.net,
        )

    def against(self, settings: SampleConfig) -> Iterable[tuple[str, str]]:
        for stage, keys in STAGES.items():
            for key in keys if stage not in self.transformers else ():
                if key in settings.unusual():
                    yield (
                        key,
                        f"{key} is {getattr(settings, key)}, and there is no {stage} stage in this prior (stages: "
                        f"{self.stages}, in its config): leave it out, or join the prior with one that has it",
                    )

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        yield from unturned(self.net, self.grid)
        yield from ((f"fine_{key}", text) for key, text in unturned(self.fine_net, self.grid))
        if not 0 <= self.coarse_noise < 1:
            yield "coarse_noise", f"coarse_noise is {self.coarse_noise}: use a share from 0 to below 1"
        if not isinstance(self.head, FlatConfig) or self.head.embedding != "tied":
            yield (
                "head.embedding",
                "the second stage embeds no fine ids, and a table for that would be read by nobody: use head "
                "{embedding: tied}, flat, with init_scale 0.0 for logits that begin at zero",
            )
        if self.coarse_head.wants_features:
            yield "coarse_head.embedding", "clusters have no vectors of their own: use rows or tied"
