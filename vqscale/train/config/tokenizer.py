"""The settings of a run that trains a tokenizer, as frozen dataclasses that mirror the YAML. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from vqscale.config import Free
from vqscale.data.config import MediumConfig
from vqscale.engine.config import AverageConfig, EngineConfig, OptimConfig, check_whole
from vqscale.nets.config import by, grid
from vqscale.parallel.config import MeshConfig
from vqscale.tokenizer.config import TokenizerConfig
from vqscale.train.config.drawn_ids import DrawnIdsConfig
from vqscale.train.config.first_weights import TOKENIZER_PARTS, TokenizerInit, TokenizerPart, trained_problems
from vqscale.train.config.losses import LossConfig
from vqscale.train.config.run import RunConfig, check_batch, check_compile, check_graphs
from vqscale.train.config.swaps import SwapsConfig


@dataclass(frozen=True)
class DataConfig:
    """What is trained on and what is measured on."""

    train: MediumConfig
    """training shards"""
    val: Free[MediumConfig | None] = None
    """held-out shards; null measures nothing"""
    batch: int = 256
    """images per optimiser step, over all processes and micro-batches"""

    def problems(self) -> Iterable[tuple[str, str]]:
        if self.batch < 1:
            yield "batch", f"batch is {self.batch}: use at least 1"
        if self.val is not None and self._kind(self.val) != self._kind(self.train):
            yield (
                "val",
                f"val has {self.val.kind} of {by(self.val.shape)} numbers and train has {self.train.kind} of "
                f"{by(self.train.shape)}: measure on samples of the kind and number of channels that are trained on",
            )

    def _kind(self, source: MediumConfig) -> tuple[str, int]:
        return source.kind, source.shape[0]


@dataclass(frozen=True)
class TokenizerRun:
    """Train a tokenizer."""

    data: DataConfig
    """images"""
    run: RunConfig
    """folder, length, seed, rhythm"""
    task: Literal["tokenizer"] = "tokenizer"
    """what is trained"""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    """the model"""
    init: TokenizerInit | None = None
    """weights that are there to begin from; null draws all anew"""
    trained: tuple[TokenizerPart, ...] | None = None
    """the parts that learn, the others stay to the bit what init took; null is all"""
    swaps: SwapsConfig | None = None
    """ids that the decoder is given in place of those of its images, where it alone is trained; null gives these"""
    drawn: DrawnIdsConfig | None = None
    """ids that a prior has drawn, for the decoder alone; null gives it none"""
    loss: LossConfig = field(default_factory=LossConfig)
    """losses on images"""
    average: AverageConfig = field(default_factory=AverageConfig)
    """moving average of the weights"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimiser and learning rate"""
    engine: EngineConfig = field(default_factory=EngineConfig)
    """DeepSpeed or plain torch, precision, clipping"""
    mesh: Free[MeshConfig] = field(default_factory=MeshConfig)
    """how the processes are laid out"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from self._sides_problems("data.train", self.data.train)
        if self.data.val is not None and self.data.val.shapes != self.data.train.shapes:
            yield from self._sides_problems("data.val", self.data.val)
        yield from self.tokenizer.signal.misfits(self.data.train, self.loss)
        yield from self._loss_problems(self.data.train.least_side)
        yield from self._vision_problems()
        yield from trained_problems(self.trained, TOKENIZER_PARTS, self.init)
        for key in ("swaps", "drawn"):
            if getattr(self, key) is not None and self.trained != ("decoder",):
                yield (
                    key,
                    f"{key} gives the decoder other ids than those of its images, and trained is "
                    f"{self.trained or 'null'}: a gradient that passes them says nothing to encoder and codes; use "
                    "trained: [decoder]",
                )
        if self.swaps is not None and hasattr(self.tokenizer.quantizer, "inner"):
            yield (
                "swaps",
                f"swaps takes the neighbours of a code, and tokenizer.quantizer {self.tokenizer.quantizer.name} has "
                "several codes per token: use swaps: null",
            )
        if self.drawn is not None:
            yield from self._drawn_problems()
        yield from check_compile(self.run, self.engine)
        yield from check_graphs(self.run, self.engine, len(self.data.train.shapes))
        yield from check_whole(self.engine, self.optim)
        if self.loss.adversarial is not None and self.loss.adversarial.optim is not None:
            yield from check_whole(self.engine, self.loss.adversarial.optim, "loss.adversarial.optim.name")

    def _sides_problems(self, key: str, source: MediumConfig) -> Iterable[tuple[str, str]]:
        for _, *sides in source.shapes:
            try:
                grid(self.tokenizer.net, sides)
            except ValueError as error:
                yield f"{key}.{'buckets' if source.measure else 'image_size'}", str(error)

    def _vision_problems(self) -> Iterable[tuple[str, str]]:
        """Of what learns from a frozen vision model."""
        alignment, adversarial = self.loss.alignment, self.loss.adversarial
        seen = {"loss.alignment": alignment, "loss.adversarial.net": getattr(adversarial, "net", None)}
        asked = [key for key, one in seen.items() if hasattr(one, "vision")]
        if asked and not self.tokenizer.signal.perceptual:
            yield (
                asked[0],
                f"{' and '.join(asked)} learn from a vision model of images, and tokenizer.signal is "
                f"{self.tokenizer.signal.name}: use alignment: null, and another discriminator",
            )
        elif alignment is not None:
            if self.trained is not None and "encoder" not in self.trained:
                yield (
                    "loss.alignment",
                    f"alignment changes the codes that the encoder takes, and trained {list(self.trained)} freezes it: "
                    "use alignment: null, or train the encoder",
                )
            with suppress(ValueError):  # sides that the net does not take are said once
                for _, *sides in self.data.train.shapes:
                    yield from alignment.grid_problems(grid(self.tokenizer.net, sides))

    def _drawn_problems(self) -> Iterable[tuple[str, str]]:
        adversarial = self.loss.adversarial
        if adversarial is None:
            yield (
                "drawn",
                "drawn gives the decoder ids of no image, of which a discriminator alone can say what they should look "
                "like, and loss.adversarial is null: give one, or use drawn: null",
            )
        elif adversarial.feature_weight:
            yield (
                "loss.adversarial.feature_weight",
                f"feature_weight is {adversarial.feature_weight}, and the maps of what is made of drawn ids have those "
                "of no image beside them: use 0",
            )
        if len(self.data.train.shapes) > 1 or self.tokenizer.net.takes_context:
            what = "a context" if self.tokenizer.net.takes_context else f"{len(self.data.train.shapes)} shapes"
            yield (
                "drawn",
                f"drawn ids are of one grid and of no context, and the samples of data.train have {what}: use drawn: "
                "null",
            )

    def _loss_problems(self, size: int) -> Iterable[tuple[str, str]]:
        adversarial = self.loss.adversarial
        if self.init is not None and "discriminator" in self.init.parts and adversarial is None:
            yield (
                "init.parts",
                "init takes a discriminator, and loss.adversarial is null: leave discriminator out, or give "
                "loss.adversarial as the run has it that it is taken from",
            )
        if adversarial is None:
            return
        if not self.tokenizer.signal.returns_samples:
            yield (
                "loss.adversarial",
                f"a discriminator tells samples and reconstructions apart, and tokenizer.signal "
                f"{self.tokenizer.signal.name} gives logits of classes back: use adversarial: null",
            )
            return
        if size < adversarial.net.least_side:
            yield (
                "loss.adversarial.net",
                f"the discriminator {adversarial.net.name} has no answer for samples with a side of {size} "
                f"(data.train.image_size), it needs {adversarial.net.least_side}: change its settings (num_layers of "
                "patchgan), or use larger samples",
            )
        if adversarial.adaptive and "decoder" not in (self.trained or TOKENIZER_PARTS):
            yield (
                "loss.adversarial.adaptive",
                f"adaptive asks for a gradient at the decoder's last layer, and trained {list(self.trained or ())} "
                "freezes the decoder: use adaptive: false with a constant weight, or train the decoder",
            )
        if adversarial.adaptive and self.engine.name == "deepspeed" and self.engine.zero_stage == 3:
            yield (
                "loss.adversarial.adaptive",
                "adaptive asks for a gradient at the decoder's last layer, and engine.zero_stage 3 takes that layer "
                "apart before it can be had: use a stage up to 2, or adaptive: false with a constant weight",
            )

    def check_world(self, world: int) -> None:
        """ValueError when this run does not fit `world` processes."""
        self.mesh.resolve(world)
        check_batch(self.data.batch, self.engine.accumulation, world)
        if self.drawn is not None:
            self.drawn.count(self.data.batch // self.engine.accumulation // world)
