"""Train the classifiers of what is drawn here, judges that need no download, and find them again on disk.

    SHAPES     of drawn pictures          SOUNDS     of drawn sounds, by their mel bands

Their samples are drawn as they are wanted, each rank its own places of a batch, and kept: nothing is read. Every sample
of a step is varied by what its place in the step says, so that a training is the same on any number of processes, to
rounding. Minutes at most, so it is not resumed. What they say is in metrics/{shapes,sounds}_classifier.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import noise
from vqscale.data.made import shapes, sounds
from vqscale.engine.config import EngineConfig, OptimConfig
from vqscale.engine.engine import Engine
from vqscale.metrics.classifiers import drawn, look
from vqscale.metrics.shapes_classifier import pictures
from vqscale.metrics.sounds_classifier import spectra
from vqscale.nets.classifiers import ShapesClassifier, SoundsClassifier
from vqscale.nets.config.classifiers import ShapesClassifierConfig, SoundsClassifierConfig
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive
from vqscale.tokenizer import export, saved


@dataclass(frozen=True)
class Family:
    """The classifiers of one medium: what they are of, their network, and how their samples are drawn and varied."""

    kind: export.Kind
    of: str
    """what it judges, for its card"""
    things: str
    """samples, as people call them"""
    classes: Sequence[str]
    schema: Any
    network: Any
    drawn: Callable[[list[int], Any], tuple[Tensor, Tensor]]
    """numbers, config -> (what the network takes, classes)"""
    varied: Callable[[Tensor, Tensor], Tensor]
    """what the network takes, a key for each -> the same, varied"""

    def train(self, config: Any, mesh: Mesh, advance: Callable[[int, float], None] | None = None) -> Any:
        """A trained classifier on the mesh's device, the same on every rank. Collective."""
        if config.batch % mesh.world.size:
            raise ValueError(
                f"batch {config.batch}, of the {self.kind}, does not divide by {mesh.world.size} processes: change "
                "--batch or --nproc_per_node"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(self.kind, config.seed))
            classifier = self.network(config, len(self.classes)).to(mesh.device)
        optim = OptimConfig(
            lr=config.lr, eps=1e-6, weight_decay=0.05, schedule="cosine", warmup_steps=min(20, config.steps - 1)
        )
        engine = Engine(classifier, {}, EngineConfig(name="torch"), optim, mesh, config.steps)
        mine, kept = config.batch // mesh.world.size, dict[int, tuple[Tensor, Tensor]]()
        for step in range(config.steps):
            places = torch.arange(mine) + mesh.world.rank * mine
            first = (step * config.batch) % config.num_images
            numbers = [(first + place) % config.num_images for place in places.tolist()]
            samples, labels = self._drawn(numbers, config, kept)
            samples = self.varied(samples, noise.keys(derive(config.seed, "varied"), step, places)).to(mesh.device)
            engine.backward(F.cross_entropy(engine(samples).logits_NC, labels.to(mesh.device)))
            engine.step()
            if advance is not None:
                advance(config.batch, 0.0)
        return classifier.eval().requires_grad_(False)

    def _drawn(self, numbers: list[int], config: Any, kept: dict[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The samples with these numbers and their classes, drawn once."""
        new = [number for number in dict.fromkeys(numbers) if number not in kept]
        if new:
            kept.update(zip(new, zip(*self.drawn(new, config), strict=True), strict=True))
        samples, labels = zip(*(kept[number] for number in numbers), strict=True)
        return torch.stack(samples), torch.stack(labels)

    def save(self, folder: Path | str, classifier: Any, mesh: Mesh, facts: dict[str, Any]) -> dict[str, Any]:
        """Write model.safetensors and card.json with its accuracy on held-out samples; returns the card. Collective."""
        config = classifier.config
        numbers = [config.num_images + n for n in range(config.num_held_out)]
        accuracy, _ = look(classifier, drawn(numbers, lambda some: self.drawn(some, config), mesh), mesh)
        card = {
            "name": self.kind,
            "about": f"a judge of drawn {self.of}; its numbers are not FID and compare with no other network's",
            "classes": list(self.classes),
            "metrics": {"accuracy": accuracy, "images": config.num_held_out},
            **facts,
        }
        export.write(folder, classifier, config, card, mesh, kind=self.kind)
        return card

    def load(self, folder: Path | str, mesh: Mesh) -> tuple[Any, dict[str, Any]]:
        """(the classifier on the mesh's device, its card). Collective. ValueError for what is no such folder."""
        source = saved.find(folder, mesh, task=self.kind, schema=self.schema)
        classes = source.card.get("classes")
        if classes != list(self.classes):
            raise ValueError(
                f"the {self.kind} in {folder} was trained on the classes {classes}, and {self.kind.split()[0]} are now "
                f"{list(self.classes)}: train it again with `vqscale classifier`"
            )
        classifier = self.network(source.config, len(self.classes)).to(mesh.device)
        source.fill(classifier, mesh)
        return classifier.eval().requires_grad_(False), source.card


def varied_pictures(images: Tensor, keys_N: Tensor) -> Tensor:
    """The pictures, each mirrored or not, inverted or not, with its colours in another order, as its key says."""
    chance = noise.uniform(keys_N, 0, 5)
    across, inverted = (chance[:, n, None, None, None] < 0.5 for n in range(2))
    images = torch.where(across, images.flip(3), images)
    images = torch.where(inverted, 255 - images, images)
    order_N3 = chance[:, 2:].argsort(dim=1)
    return images.gather(1, order_N3[:, :, None, None].expand(images.shape))


def varied_spectra(bands: Tensor, keys_N: Tensor) -> Tensor:
    """Half of the frames of each (N, count, frames), from a place that its key says."""
    length = bands.shape[2] // 2
    first_N = (noise.uniform(keys_N, 0, 1)[:, 0] * (bands.shape[2] - length + 1)).long()
    frames = (first_N[:, None] + torch.arange(length))[:, None].expand(-1, bands.shape[1], -1)
    return bands.gather(2, frames)


SHAPES = Family(
    "shapes classifier",
    "pictures of shapes",
    "pictures",
    shapes.CLASS_NAMES,
    ShapesClassifierConfig,
    ShapesClassifier,
    lambda numbers, config: pictures(numbers, config.image_size, config.seed),
    varied_pictures,
)
SOUNDS = Family(
    "sounds classifier",
    "sounds",
    "sounds",
    sounds.CLASS_NAMES,
    SoundsClassifierConfig,
    SoundsClassifier,
    spectra,
    varied_spectra,
)
MEDIA = {"images": SHAPES, "sounds": SOUNDS}
