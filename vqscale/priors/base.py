"""What every prior has: the interface, its vocabulary and classes, guidance, and how it is found and left on disk.

A prior is called with this rank's images and talks to nobody; its head does (codes/heads/flat.py). All ranks of a code
group have the same number of images. Not here: how ids are modelled (one file each), and training (train/prior.py).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from vqscale.codes import noise, tally
from vqscale.codes.heads.flat import Head
from vqscale.nets.config_transformer import TransformerConfig
from vqscale.nets.transformer import Classes
from vqscale.parallel import ops
from vqscale.parallel.mesh import Axis, Mesh
from vqscale.priors.config import IdsConfig, PriorConfig
from vqscale.seed import derive
from vqscale.tokenizer import export, saved

Schedule = Literal["constant", "linear", "cosine"]
NOBODY = torch.iinfo(torch.int64).min  # what the head ignores, so that -1 is an error like any other wrong id


@dataclass
class Modelled:
    """What a prior says of a batch of ids."""

    loss: Tensor  # to be minimised: a mean over this rank's tokens
    nats_B: Tensor  # of each image, the mean nats of a token; no gradient. In evaluation mode the loss is their mean
    # The rest is for the eye, and there while tally.statistics are on.
    right_B: Tensor | None = None  # of each image, the share of ids that were the most probable; in evaluation mode
    parts: dict[str, Tensor] = field(default_factory=dict)  # of the loss, by name; cross_entropy of the ids is one
    stats: dict[str, Tensor] = field(default_factory=dict)


class Prior(nn.Module, ABC):
    """A distribution of ids (B, h, w) given a class, -1 for none. `card` has what is known of where weights come from.

    Label smoothing, z_loss, dropout and the dropping of classes act in training mode only.
    """

    def __init__(self, config: IdsConfig, net: TransformerConfig, mesh: Mesh | None, seed: int) -> None:
        super().__init__()
        self.mesh = mesh or Mesh()
        self.config = config
        self.card: dict[str, Any] = {}
        chosen = derive(seed, "ids")
        self.head = Head.from_config(
            config.head, config.num_codes, net.width, self.mesh, seed=chosen, feature_dim=config.feature_dim
        )
        self.classes = Classes(config.num_classes, net)

    @property
    def num_codes(self) -> int:
        return self.config.num_codes

    @property
    def num_classes(self) -> int:
        return self.config.num_classes

    @property
    def class_dropout(self) -> float:
        """Share of images that were trained with the null class; where it is 0, guidance has nothing to go by."""
        return self.config.class_dropout

    @property
    def fingerprint(self) -> str:
        """sha256 over the config and every parameter with all rows, the same on any number of ranks; hexadecimal.

        Computed when asked; collective on the code axis.
        """
        return export.fingerprint(self, self.config)

    @abstractmethod
    def loss(self, ids_Bhw: Tensor, condition_B: Tensor, keys_B: Tensor | None = None) -> Modelled:
        """The loss of ids int64 (B, h, w), every one of 0 .. K - 1, given classes -1 .. C - 1; collective.

        keys_B (noise.keys) decide what is random per image (dropped classes), on any number of ranks alike; without
        them torch's generator does. Training and the evaluations of a run always give them.
        """

    @abstractmethod
    def sample(
        self,
        condition_B: Tensor,
        *,
        numbers_B: Tensor,
        grid: tuple[int, ...] | None = None,
        seed: int = 0,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance: float = 1.0,
        schedule: Schedule = "constant",
        cached: bool = True,
    ) -> Tensor:
        """Draw ids (B, h, w) for classes; collective, no gradient, in evaluation mode.

        numbers_B number the images over all ranks: (seed, number) decides an image, on any number of ranks and in any
        batch, up to ties within rounding. Guidance s changes logits to u + s (c - u), u those of the null class, over
        the positions as `guidance_scales` says; 1 is none and costs nothing. Then temperature, top-k, top-p, as
        Head.sample. `cached` False computes every position from the beginning: slow, and the definition.
        """

    def forward(self, ids_Bhw: Tensor, condition_B: Tensor, keys_B: Tensor | None = None) -> Modelled:
        return self.loss(ids_Bhw, condition_B, keys_B)

    @classmethod
    def load(
        cls, path: str | Path, *, mesh: Mesh | None = None, weights: Literal["average", "parameters"] = "average"
    ) -> Prior:
        """The trained prior of a run folder (its newest whole checkpoint), of one of its checkpoint folders, or of a
        folder that `save` wrote; in evaluation mode, on the mesh's device.

        `weights` "average" takes the moving averages of a checkpoint, or the parameters where it has none; a saved
        folder has what was saved. With a mesh it is collective, and a rank reads only its own rows. ValueError on all
        ranks for what cannot be loaded.
        """
        from vqscale import priors

        mesh = mesh or Mesh()
        source = saved.find(path, mesh, weights, task="prior", schema=PriorConfig)
        with torch.random.fork_rng(devices=[]):
            prior = priors.build(source.config, mesh)
        source.fill(prior, mesh)
        prior.card = source.card
        return prior.eval()

    def save(self, folder: str | Path, card: Mapping[str, Any] | None = None) -> Path:
        """Write model.safetensors and card.json, from which `load` gives the same prior to the bit, on any number of
        processes; collective. The rows of all ids are in it, and nothing that only a training wants.

        `card` adds to what is known of the weights. Only rank 0 writes, and no rank holds the rows of all. ValueError
        on all ranks where the folder holds something already.
        """
        return export.write(folder, self, self.config, {**self.card, **(card or {})}, self.mesh, kind="prior")

    def checked(self, ids_Bhw: Tensor) -> Tensor:
        """ids as they are; ValueError where they are not those of an image of the config's grid."""
        grid = tuple(ids_Bhw.shape[1:])
        if grid != tuple(self.config.grid):
            raise ValueError(
                f"ids have the shape {list(ids_Bhw.shape)}, images x grid, but this prior is one of "
                f"{' x '.join(map(str, self.config.grid))} ids (grid, in its config): give ids of that grid, or "
                "build a prior of another"
            )
        return ids_Bhw

    def modelled(self, h_BTD: Tensor, ids_Bhw: Tensor) -> Modelled:
        """The loss of ids (B, h, w) given the vectors that predict each of them, T = h w; collective.

        The head gives the sum of a loss: with statistics on, what label smoothing and z_loss add to the cross entropy
        is found by a pass over the vocabulary for each of them, without gradient, and by none where they are 0. Nor
        does the head say which id was the most probable: right_B is another pass, in float32, which training is spared.
        """
        h_ND, ids_N = h_BTD.flatten(0, 1), ids_Bhw.flatten()
        smoothing, z_loss = (self.config.label_smoothing, self.config.z_loss) if self.training else (0.0, 0.0)

        def loss(smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
            return self.head.loss(h_ND, ids_N, label_smoothing=smoothing, z_loss=z_loss, ignore=NOBODY)

        def of_images(values_N: Tensor) -> Tensor:
            return values_N.detach().unflatten(0, h_BTD.shape[:2]).mean(1)

        nats_N = loss(smoothing, z_loss)
        found = Modelled(nats_N.mean(), of_images(nats_N))
        if not tally.statistics.on:
            return found
        with torch.no_grad():
            plain = whole = found.loss.detach()
            if z_loss:  # a weight of 1 more, because the difference that z_loss itself makes is lost in rounding
                found.parts["z_loss"] = z_loss * (loss(smoothing, z_loss + 1.0).mean() - whole)
                plain = whole - found.parts["z_loss"]
            found.parts["cross_entropy"] = loss().mean() if smoothing else plain
            if not self.training:
                best_N = self.head.sample(h_ND, torch.zeros_like(ids_N), temperature=0.0)
                found.right_B = of_images((best_N == ids_N).double())
        return found

    def labels(self, condition_B: Tensor, keys_B: Tensor | None = None) -> Tensor:
        """Classes as the network sees them, -1 for the null class: in training some are dropped. Collective on a CPU.

        ValueError on all ranks of the code group for labels outside -1 .. C - 1.
        """
        labels_B = condition_B.to(torch.int64)
        check_labels(labels_B, self.config.num_classes, self.mesh.codes)
        if not self.training or not self.config.class_dropout:
            return labels_B
        if keys_B is None:
            keys_B = torch.randint(2**62, labels_B.shape, device=labels_B.device)
        dropped_B = noise.uniform(keys_B, 0, 1)[:, 0] < self.config.class_dropout
        return torch.where(dropped_B, -1, labels_B)

    def sampled(self, condition_B: Tensor, numbers_B: Tensor, grid: tuple[int, ...] | None) -> Tensor:
        """The labels of images to be drawn. ValueError for what no prior can draw; collective on a CPU."""
        if grid is not None and tuple(grid) != tuple(self.config.grid):
            raise ValueError(
                f"grid is {list(grid)}, an argument of sample, but this prior was built for {list(self.config.grid)}, "
                "the grid of its config: leave it out, or train a prior of that grid"
            )
        if condition_B.shape != numbers_B.shape or condition_B.dim() != 1:
            raise ValueError(
                f"classes have the shape {list(condition_B.shape)} and numbers_B {list(numbers_B.shape)}, arguments of "
                "sample: give one class and one number for each image"
            )
        return self.labels(condition_B)

    @contextmanager
    def evaluating(self) -> Iterator[Self]:
        """Evaluation mode inside, and whatever it was before afterwards."""
        training = self.training
        self.eval()
        try:
            yield self
        finally:
            self.train(training)


def check_labels(labels_B: Tensor, num_classes: int, axis: Axis) -> None:
    """ValueError on every rank of the axis when any has a label outside -1 .. num_classes - 1.

    On a GPU the check waits for nobody and fails inside the device.
    """
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


def guidance_scales(scale: float, schedule: Schedule, steps: int) -> list[float]:
    """The scale at each of `steps` positions: the same at all, or from 1 at the first to `scale` at the last.

    linear   1 + (scale - 1) i / (steps - 1)         cosine   1 + (scale - 1) (1 - cos(pi i / (steps - 1))) / 2
    """
    ramps = {
        "constant": lambda t: 1.0,
        "linear": lambda t: t,
        "cosine": lambda t: (1.0 - math.cos(math.pi * t)) / 2.0,
    }
    if schedule not in ramps:
        raise ValueError(f"schedule is {schedule!r}, an argument of sample: choose one of {', '.join(ramps)}")
    return [1.0 + (scale - 1.0) * ramps[schedule](i / max(1, steps - 1)) for i in range(steps)]
