"""The settings of a run that trains a prior, as frozen dataclasses that mirror the YAML. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Annotated, Literal

from vqscale.config import Free, FreeToChange
from vqscale.data.config import ShardsConfig
from vqscale.data.config_tokens import SourceConfig, TokensConfig
from vqscale.engine.config import AverageConfig, EngineConfig, OptimConfig, check_whole
from vqscale.nets.config import by
from vqscale.parallel.config import MeshConfig
from vqscale.priors.config import PriorConfig
from vqscale.priors.config.autoregressive import AutoregressiveConfig
from vqscale.train.config.first_weights import PRIOR_PARTS, PriorInit, PriorPart, trained_problems
from vqscale.train.config.run import RunConfig, check_batch, check_compile


@dataclass(frozen=True)
class TokenDataConfig:
    """The ids that are trained on and measured on: of a token cache, or of shards of a medium whose samples the
    tokenizer encodes as they come, so that every crop has ids of its own."""

    train: SourceConfig
    """token cache of the training images, or their shards"""
    val: Free[SourceConfig | None] = None
    """token cache of held-out images, of the same tokenizer, or their shards; null measures nothing"""
    batch: int = 256
    """images per optimiser step, over all processes and micro-batches"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.batch < 1:
            yield "batch", f"batch is {self.batch}: use at least 1"
        train, val = _what(self.train), None if self.val is None else _what(self.val)
        if val not in (None, train):
            yield "val", f"val is {val}, and train {train}: measure on ids that come as those do that are trained on"

        for name, source in self.sources.items():
            if isinstance(source, ShardsConfig) and len(source.shapes) > 1:
                yield (
                    name,
                    f"{name} has {source.kind} of {len(source.shapes)} shapes, and a prior has one grid of ids: use "
                    "medium: images",
                )

    @property
    def sources(self) -> dict[str, SourceConfig]:
        """train, and val where there is one."""
        return {"train": self.train} | ({} if self.val is None else {"val": self.val})

    @property
    def contexts(self) -> dict[str, ShardsConfig | None]:
        """Of each source that is a cache the shards of its contexts."""
        caches = {name: source for name, source in self.sources.items() if isinstance(source, TokensConfig)}
        return {name: cache.contexts for name, cache in caches.items()}


def _what(source: SourceConfig) -> str:
    return "a token cache" if isinstance(source, TokensConfig) else f"{source.kind} of {by(source.shape)} numbers"


@dataclass(frozen=True)
class PriorRun:
    """Train a prior over the ids of a token cache, or of samples that are encoded as they come."""

    data: TokenDataConfig
    """ids"""
    run: RunConfig
    """folder, length, seed, rhythm"""
    task: Literal["prior"] = "prior"
    """what is trained"""
    prior: PriorConfig = field(default_factory=AutoregressiveConfig)
    """the model"""
    tokenizer: Free[str | None] = None
    """folder of the tokenizer, with shards, whose samples it encodes, or with prior.head.embedding: codebook, where the
    vectors of its codes embed the ids; it is frozen"""
    init: PriorInit | None = None
    """weights that are there to begin from; null draws all anew"""
    trained: tuple[PriorPart, ...] | None = None
    """the parts that learn, the others stay to the bit what init took; null is all"""
    average: AverageConfig = field(default_factory=AverageConfig)
    """moving average of the weights"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimiser and learning rate"""
    # Nothing in a prior is of one micro-batch, as entropies and revival are in a tokenizer.
    engine: Annotated[EngineConfig, FreeToChange("accumulation")] = field(default_factory=EngineConfig)
    """DeepSpeed or plain torch, precision, clipping"""
    mesh: Free[MeshConfig] = field(default_factory=MeshConfig)
    """how the processes are laid out"""

    def problems(self) -> Iterable[tuple[str, str]]:
        wants, encodes = self.prior.head.wants_features, not isinstance(self.data.train, TokensConfig)
        if encodes and self.tokenizer is None:
            yield (
                "tokenizer",
                f"tokenizer is null, and data.train is {_what(self.data.train)}, which a tokenizer has to encode: give "
                "its folder, or a token cache as data.train",
            )
        looks, contexts = self.prior.condition.wants_context, self.data.contexts
        for name in [name for name, given in contexts.items() if (given is None) == looks]:
            yield (
                f"data.{name}.contexts",
                f"prior.condition is {self.prior.condition.name}, and a token cache has ids and no contexts: give the "
                "shards that it was encoded from as contexts, and the folder of the tokenizer"
                if looks
                else f"prior.condition is {self.prior.condition.name}, which looks at no context: use contexts: null",
            )
        if not encodes and (self.tokenizer is None) == (wants or looks):
            takes = "takes" if wants or looks else "takes no"
            yield (
                "tokenizer",
                f"tokenizer is {self.tokenizer}, and the prior {takes} vectors of its codes or contexts; give the "
                "folder of the tokenizer with prior.head.embedding: codebook or prior.condition: context, and null "
                "with the others",
            )
        if self.prior.wants_clusters and self.prior.clusters is None:
            yield (
                "prior.clusters",
                "prior.clusters is null, and this prior is of clusters of the tokenizer's codes: give the file that "
                "vqscale cluster TOKENIZER has written",
            )
        yield from trained_problems(self.trained, PRIOR_PARTS, self.init)
        yield from check_compile(self.run, self.engine)
        if self.run.cuda_graphs:
            yield (
                "run.cuda_graphs",
                "CUDA graphs are of a tokenizer, and the blocks of a prior are compiled one by one, so "
                "that one would write over what another returned: use run.cuda_graphs: false",
            )
        yield from check_whole(self.engine, self.optim)

    def check_world(self, world: int) -> None:
        """ValueError when this run does not fit `world` processes."""
        self.mesh.resolve(world)
        check_batch(self.data.batch, self.engine.accumulation, world)
