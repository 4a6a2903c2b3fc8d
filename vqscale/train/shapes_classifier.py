"""Train the shapes classifier, the judge of drawn samples that needs no download, and find it again on disk.

Its pictures are drawn as they are wanted, each rank its own places of a batch, and kept: nothing is read. Every picture
of a step is mirrored, inverted and coloured by what its place in the step says, so that a training is the same on any
number of processes, to rounding. Minutes at most, so it is not resumed. What it says of samples is in
metrics/shapes_classifier.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vqscale.codes import noise
from vqscale.data.made.shapes import CLASS_NAMES, NUM_CLASSES
from vqscale.engine.config import EngineConfig, OptimConfig
from vqscale.engine.engine import Engine
from vqscale.metrics.shapes_classifier import Pictures, drawn, look, pictures
from vqscale.nets.config.shapes import ShapesClassifierConfig
from vqscale.nets.shapes_classifier import ShapesClassifier
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive
from vqscale.tokenizer import export, saved

KIND: export.Kind = "shapes classifier"


def train(
    config: ShapesClassifierConfig, mesh: Mesh, advance: Callable[[int, float], None] | None = None
) -> ShapesClassifier:
    """A trained classifier on the mesh's device, the same on every rank. Collective."""
    if config.batch % mesh.world.size:
        raise ValueError(
            f"batch {config.batch}, of the shapes classifier, does not divide by {mesh.world.size} processes: change "
            "--batch or --nproc_per_node"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive("shapes classifier", config.seed))
        classifier = ShapesClassifier(config, NUM_CLASSES).to(mesh.device)
    optim = OptimConfig(
        lr=config.lr, eps=1e-6, weight_decay=0.05, schedule="cosine", warmup_steps=min(20, config.steps - 1)
    )
    engine = Engine(classifier, {}, EngineConfig(name="torch"), optim, mesh, config.steps)
    mine, kept = config.batch // mesh.world.size, dict[int, tuple[Tensor, Tensor]]()
    for step in range(config.steps):
        places = torch.arange(mine) + mesh.world.rank * mine
        first = (step * config.batch) % config.num_images
        numbers = [(first + place) % config.num_images for place in places.tolist()]
        images, labels = _drawn(numbers, config, kept)
        images = varied(images, noise.keys(derive(config.seed, "varied"), step, places)).to(mesh.device)
        engine.backward(F.cross_entropy(engine(images).logits_NC, labels.to(mesh.device)))
        engine.step()
        if advance is not None:
            advance(config.batch, 0.0)
    return classifier.eval().requires_grad_(False)


def _drawn(
    numbers: list[int], config: ShapesClassifierConfig, kept: dict[int, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """The pictures with these numbers and their classes, drawn once."""
    new = [number for number in dict.fromkeys(numbers) if number not in kept]
    if new:
        kept.update(zip(new, zip(*pictures(new, config.image_size, config.seed), strict=True), strict=True))
    images, labels = zip(*(kept[number] for number in numbers), strict=True)
    return torch.stack(images), torch.stack(labels)


def varied(images: Tensor, keys_N: Tensor) -> Tensor:
    """The pictures, each mirrored or not, inverted or not, with its colours in another order, as its key says."""
    chance = noise.uniform(keys_N, 0, 5)
    across, inverted = (chance[:, n, None, None, None] < 0.5 for n in range(2))
    images = torch.where(across, images.flip(3), images)
    images = torch.where(inverted, 255 - images, images)
    order_N3 = chance[:, 2:].argsort(dim=1)
    return images.gather(1, order_N3[:, :, None, None].expand(images.shape))


def held_out(config: ShapesClassifierConfig, mesh: Mesh) -> Pictures:
    """This rank's part of the pictures that the classifier's own accuracy is measured on."""
    return drawn([config.num_images + n for n in range(config.num_held_out)], config, mesh)


def save(folder: Path | str, classifier: ShapesClassifier, mesh: Mesh, facts: dict[str, Any]) -> dict[str, Any]:
    """Write model.safetensors and card.json with its accuracy on held-out pictures; returns the card. Collective."""
    accuracy, _ = look(classifier, held_out(classifier.config, mesh), mesh)
    card = {
        "name": KIND,
        "about": "a judge of drawn pictures of shapes; its numbers are not FID and compare with no other network's",
        "classes": list(CLASS_NAMES),
        "metrics": {"accuracy": accuracy, "images": classifier.config.num_held_out},
        **facts,
    }
    export.write(folder, classifier, classifier.config, card, mesh, kind=KIND)
    return card


def load(folder: Path | str, mesh: Mesh) -> tuple[ShapesClassifier, dict[str, Any]]:
    """(the classifier on the mesh's device, its card). Collective. ValueError for what is no such folder."""
    source = saved.find(folder, mesh, task=KIND, schema=ShapesClassifierConfig)
    classes = source.card.get("classes")
    if classes != list(CLASS_NAMES):
        raise ValueError(
            f"the shapes classifier in {folder} was trained on the classes {classes}, and shapes are now "
            f"{list(CLASS_NAMES)}: train it again with `vqscale classifier`"
        )
    classifier = ShapesClassifier(source.config, NUM_CLASSES).to(mesh.device)
    source.fill(classifier, mesh)
    return classifier.eval().requires_grad_(False), source.card
