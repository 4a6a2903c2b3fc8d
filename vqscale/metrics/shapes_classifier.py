"""What the shapes classifier says of drawn samples, beside what it says of real pictures of the same classes.

    recognised            share of the samples that it takes for the class they were drawn as
    shapes_distance       Fréchet distance between its features of the samples and of real pictures
    recognised_real, shapes_distance_real        the same of as many other real pictures: what is to be reached

It is a judge of pictures made by data/made/shapes.py alone, and its distance is none of Inception's: it bears no name
of the field. Real pictures are drawn here, from the endless set that the classifier was trained on, at numbers that it
never saw. Not here: the network (an argument) and its training (train/classifiers.py).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vqscale.data.made.shapes import CLASS_NAMES, NUM_CLASSES, draw
from vqscale.metrics.classifiers import BATCH, Classifier, Samples, drawn, look
from vqscale.metrics.fid import frechet
from vqscale.metrics.sample_file import SampleFile
from vqscale.parallel.mesh import Mesh
from vqscale.seed import derive

FEWEST_REAL = 2000  # pictures that the samples' features are compared with
FIRST_REAL, FIRST_OTHER = 10**8, 2 * 10**8  # numbers of pictures that no training comes to


def pictures(numbers: list[int], size: int, seed: int) -> tuple[Tensor, Tensor]:
    """(uint8 (n, 3, H, W), classes) of the pictures with these numbers of the classifier's endless set `seed`."""
    drawn = [draw(number, size, derive("shapes classifier", seed)) for number in numbers]
    stacked = torch.from_numpy(np.stack([picture for picture, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    return stacked, torch.tensor([label for _, label in drawn])


def judge(
    images: SampleFile,
    classifier: Classifier,
    mesh: Mesh,
    advance: Callable[[int, float], None] | None = None,
) -> dict[str, float]:
    """The four numbers of a file of samples with their classes (arr_1); the same on any number of ranks. Collective.

    ValueError for pictures of another size than the classifier knows, and for classes that are not those of shapes.
    """
    labels = classes(images, classifier.config.image_size)

    def of_samples() -> Samples:
        for first, batch in images.batches(BATCH, mesh.world.rank, mesh.world.size):
            yield batch, torch.from_numpy(labels[first : first + len(batch)])
            if advance is not None:
                advance(len(batch) * mesh.world.size, 0.0)

    recognised, samples = look(classifier, of_samples(), mesh)
    _, real = look(classifier, _alike(labels, FIRST_REAL, max(FEWEST_REAL, len(labels)), classifier, mesh), mesh)
    expected, others = look(classifier, _alike(labels, FIRST_OTHER, len(labels), classifier, mesh), mesh)
    return {
        "recognised": recognised,
        "recognised_real": expected,
        "shapes_distance": frechet(samples, real),
        "shapes_distance_real": frechet(others, real),
    }


def classes(images: SampleFile, size: int) -> NDArray[np.int64]:
    """The class of each sample of a file. ValueError where the classifier cannot judge them."""
    labels = images.labels()
    check_size((images.shape[1], images.shape[2]), size, f"the samples {images.path}")
    known = f"the shapes classifier knows the classes 0 .. {NUM_CLASSES - 1} ({', '.join(CLASS_NAMES)})"
    if labels is None:
        raise ValueError(
            f"{known}, and {images.path} has no classes (arr_1): give the samples.npz of `vqscale sample` from a prior "
            "that is conditioned on classes"
        )
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise ValueError(
            f"{known}, and {images.path} has classes from {labels.min()} to {labels.max()} (arr_1): give samples of "
            "drawn shapes, each of a class"
        )
    return labels


def check_size(sides: tuple[int, int], size: int, whose: str) -> None:
    """ValueError where pictures of these sides are not those of a classifier of squares of `size`."""
    if sides != (size, size):
        raise ValueError(
            f"{whose} are {sides[0]} x {sides[1]} pixels, and this shapes classifier was trained on {size} x {size}: "
            f"train one with --image-size {sides[0]}, or give samples of its size"
        )


def _alike(labels: NDArray[np.int64], first: int, count: int, classifier: Classifier, mesh: Mesh) -> Samples:
    """This rank's part of `count` real pictures whose classes are those of the samples, again from the first."""
    # picture number n of the set has class n mod NUM_CLASSES
    numbers = [first + NUM_CLASSES * n + int(labels[n % len(labels)]) for n in range(count)]
    size, seed = classifier.config.image_size, classifier.config.seed
    return drawn(numbers, lambda some: pictures(some, size, seed), mesh)
