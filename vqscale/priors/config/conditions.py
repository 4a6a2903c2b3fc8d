"""The settings of what the ids of an image are given, and which conditions there are. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vqscale.config import OneOf
from vqscale.nets.config.vit import ImageEncoderConfig

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONDITIONS = {
    "classes": "vqscale.priors.config.conditions:ClassesConfig",
    "context": "vqscale.priors.config.conditions:ContextConfig",
}


class ConditionSettings:
    """What the settings of every condition say beside their keys."""

    name: str
    module: ClassVar[str]
    """the condition's class, as `module:Class`"""
    wants_context: ClassVar[bool] = False
    """whether it is made of the context of the tokenizer, which a token cache has not"""

    def check_labels(self, labels: NDArray[Any], path: str, num_classes: int) -> list[str]:
        """What there is to say of the labels of the images in a path. ValueError where the prior cannot learn them."""
        return []

    def misfits(self, prior: Any) -> Iterable[tuple[str, str]]:
        """(key, message) of what in the config of a prior (an IdsConfig) does not go with this condition."""
        return ()


@dataclass(frozen=True)
class ClassesConfig(ConditionSettings):
    """The class of an image, one of num_classes; a share class_dropout of the images are trained without."""

    module: ClassVar[str] = "vqscale.priors.conditions:Classes"
    without_name: ClassVar[bool] = True
    name: Literal["classes"] = "classes"
    """which condition"""

    def check_labels(self, labels: NDArray[Any], path: str, num_classes: int) -> list[str]:
        known, most = int((labels >= 0).sum()), int(labels.max(initial=-1))
        if not num_classes:
            return [f"prior.num_classes is 0: the labels of {known} images in {path} are left aside"] if known else []
        if not known:
            raise ValueError(
                f"the data in {path} has the label of none of its {len(labels)} images, and prior.num_classes is "
                f"{num_classes}: a prior learns its classes from labels; give shards that have them (cls beside every "
                "image), or what is encoded of such, or use prior.num_classes=0"
            )
        if most >= num_classes:
            raise ValueError(
                f"the data in {path} has labels up to {most}, and prior.num_classes is {num_classes}: use at least "
                f"prior.num_classes={most + 1}"
            )
        unknown = len(labels) - known
        note = f"{unknown} of the {len(labels)} images in {path} have no label: they count as the null class"
        return [note] if unknown else []


@dataclass(frozen=True)
class ContextConfig(ConditionSettings, ImageEncoderConfig):
    """The context image that the tokenizer's encoder and decoder see too (stage 2 of UViM): the tokens of a vision
    transformer over it are the prefix. A width that is not the prior's is brought to it by a linear map.
    """

    module: ClassVar[str] = "vqscale.priors.context:Context"
    wants_context: ClassVar[bool] = True
    name: Literal["context"] = "context"
    """which condition"""
    dropout: float = 0.1
    """share of the images that are trained with a learned prefix in place of their own, which guidance needs"""

    def problems(self) -> Iterable[tuple[str, str]]:
        yield from super().problems()
        if not 0 <= self.dropout < 1:
            yield "dropout", f"dropout is {self.dropout}: use a share from 0 to below 1"

    def misfits(self, prior: Any) -> Iterable[tuple[str, str]]:
        if prior.num_classes:
            yield (
                "num_classes",
                f"num_classes is {prior.num_classes}, and the condition is the context, which knows no classes: use "
                "num_classes: 0",
            )
        for name, net in prior.transformers.items():
            if net.num_prefix != self.num_vectors:
                yield (
                    "condition",
                    f"a context of {self.image_size} pixels (image_size) makes {self.num_vectors} vectors, one for "
                    f"{self.patch * self.pool} pixels of each side (patch x pool), and the transformer {name} has "
                    f"num_prefix {net.num_prefix}: use num_prefix: {self.num_vectors} there, or change pool",
                )


if TYPE_CHECKING:
    ConditionConfig = ConditionSettings
else:
    ConditionConfig = OneOf(CONDITIONS)
