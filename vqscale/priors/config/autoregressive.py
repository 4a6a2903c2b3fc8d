"""The settings of the autoregressive prior and of drawing from it; see __init__.py for what these are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from vqscale.codes.heads.config import FlatConfig
from vqscale.config import Before
from vqscale.nets.config.transformer import TransformerConfig
from vqscale.priors.config import ClusteredConfig, RuleSampleConfig, SampleConfig, switch, unturned


@dataclass(frozen=True)
class AutoregressiveSampleConfig(RuleSampleConfig):
    """Drawing id by id."""

    cached: bool = switch(off="uncached")
    """keep keys and values of the tokens so far; without, all is computed again: slow, and the definition"""
    packed: Annotated[bool, Before(False)] = switch(off="unpacked")
    """lay the matrices out once for products with few rows; without, each token passes through the network as in
    training: slower, rounded in another way, and what samples have that were begun before there was a choice"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: of the transformer's matrices, their operands, keys and values: half the bytes, other ids where two
    candidates are near; norms, the residual stream and the head's logits stay float32"""


@dataclass(frozen=True)
class AutoregressiveConfig(ClusteredConfig):
    """One id after the other, row by row, as LlamaGen and IBQ do."""

    module: ClassVar[str] = "vqscale.priors.autoregressive:Autoregressive"
    sampling: ClassVar[type[SampleConfig]] = AutoregressiveSampleConfig
    without_name: ClassVar[bool] = True
    name: Literal["autoregressive"] = "autoregressive"
    """which prior"""
    net: TransformerConfig = field(default_factory=TransformerConfig)
    """the transformer"""
    cluster_weight: float = 0.0
    """weight of -log p(cluster of the id) in the loss, in training only (IAR); 0 looks at no clusters"""

    @property
    def wants_clusters(self) -> bool:
        return self.cluster_weight > 0

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        yield from unturned(self.net, self.grid)
        if self.cluster_weight < 0:
            yield "cluster_weight", f"cluster_weight is {self.cluster_weight}, a weight: use 0 or more"
        if self.cluster_weight and (not isinstance(self.head, FlatConfig) or self.head.neighbours):
            yield (
                "cluster_weight",
                f"cluster_weight is {self.cluster_weight}, and is of a flat head whose targets are not shared: use 0, "
                "or head {name: flat, neighbours: 0}",
            )
