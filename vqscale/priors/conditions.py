"""What the ids of an image are given: vectors before the first id, made of something known about the image.

To add one: a class in a file here, its config and its line in CONDITIONS (config_conditions.py). Not here: what a
prior does with vectors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vqscale.codes import noise
from vqscale.config import load_class
from vqscale.nets.config.transformer import TransformerConfig
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis
from vqscale.priors.config import IdsConfig


class Condition(nn.Module, ABC):
    """A condition of B images (a tensor, B along its first dim) -> P vectors each; nothing known is the null condition.

    P is num_prefix of the prior's network. The null condition is what a share `dropout` of the images are trained with,
    and what guidance leads away from.
    """

    saved_as: ClassVar[str]
    """the module's name in the prior, which checkpoints have"""
    num_classes = 0
    """conditions are numbers 0 .. num_classes - 1; 0 where they are something else, or nothing"""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout

    @abstractmethod
    def of(self, batch: Any) -> Tensor:  # a data.tokens.stream.TokenBatch
        """The condition of the images of a batch of training data."""

    @abstractmethod
    def checked(self, condition: Tensor, axis: Axis) -> Tensor:
        """The condition as `forward` takes it. ValueError on all ranks of the axis where it is none; collective."""

    @abstractmethod
    def forward(self, condition: Tensor, null_B: Tensor | None = None) -> Tensor:
        """(B, P, D); of the images of null_B the null condition."""

    def summary(self, prefix_BPD: Tensor) -> Tensor:
        """Of the P vectors of each image the one (B, D) that adaln adapts to."""
        return prefix_BPD[:, 0]

    def example(self, count: int) -> Tensor | None:
        """The conditions of so many images, for plans; None where making vectors of them costs next to nothing."""
        return None

    def dropped(self, condition: Tensor, keys_B: Tensor | None = None) -> Tensor | None:
        """null_B of images in training, None where there are none; keys (noise.keys) or torch's generator decide."""
        if not self.training or not self.dropout:
            return None
        if keys_B is None:
            keys_B = torch.randint(2**62, condition.shape[:1], device=condition.device)
        return noise.uniform(keys_B, 0, 1)[:, 0] < self.dropout

    def against_guidance(self) -> str:
        """Why guidance does no good here, and what to change; empty where it does."""
        if self.dropout:
            return ""
        return (
            "this prior was trained with dropout 0 of its condition: the null condition has its first values, and "
            "guidance leads away from noise; use guidance 1, or train with dropout 0.1"
        )


class Classes(Condition):
    """Class labels 0 .. C - 1 as P vectors each, and a null class, which -1 means too: an image of unknown class."""

    saved_as = "classes"

    def __init__(self, config: IdsConfig, net: TransformerConfig) -> None:
        super().__init__(config.class_dropout)
        self.num_classes, self.num_prefix = config.num_classes, net.num_prefix
        self.table = nn.Embedding(config.num_classes + 1, net.num_prefix * net.width)
        with torch.no_grad():
            self.table.weight.normal_(0.0, net.init_scale)

    def of(self, batch: Any) -> Tensor:
        """The labels, -1 for none; a prior without classes knows none."""
        labels_B: Tensor = batch.labels
        return labels_B if self.num_classes else torch.full_like(labels_B, -1)

    def checked(self, condition: Tensor, axis: Axis) -> Tensor:
        """Labels as int64. On a GPU the check waits for nobody and fails inside the device."""
        labels_B = condition.to(torch.int64)
        check_labels(labels_B, self.num_classes, axis)
        return labels_B

    def forward(self, condition: Tensor, null_B: Tensor | None = None) -> Tensor:
        unknown_B = condition < 0 if null_B is None else (condition < 0) | null_B
        rows_B = torch.where(unknown_B, self.num_classes, condition)
        return self.table(rows_B).unflatten(-1, (self.num_prefix, -1))

    def against_guidance(self) -> str:
        if not self.num_classes:
            return "this prior has no classes to guide to (num_classes 0), so it does nothing: use guidance 1"
        if self.dropout:
            return ""
        return (
            "this prior was trained with class_dropout 0: its null class has its first values, and guidance leads away "
            "from noise, so that images get worse and not clearer; use guidance 1, or train with class_dropout 0.1"
        )


def build(config: IdsConfig, net: TransformerConfig) -> Condition:
    """The condition that a prior's config names, for its network."""
    condition: Condition = load_class(config.condition.module)(config, net)
    return condition


def check_labels(labels_B: Tensor, num_classes: int, axis: Axis) -> None:
    """ValueError on every rank of the axis when any has a label outside -1 .. num_classes - 1."""
    if labels_B.device.type != "cpu":
        if labels_B.device.type != "meta":
            inside = ((labels_B >= -1) & (labels_B < num_classes)).all()
            torch._assert_async(inside, f"classes must be in -1 .. {num_classes - 1}")
        return
    found = torch.stack([-labels_B.min(), labels_B.max()]) if len(labels_B) else torch.tensor([1, -1])
    least, most = ops.max_over(found, axis).tolist()
    if -least < -1 or most >= num_classes:
        raise ValueError(
            f"classes must be in -1 (none) .. {num_classes - 1}, for num_classes is {num_classes} in the prior's "
            f"config, but they go from {-least} to {most}: give other classes, or train with as many as there are"
        )
