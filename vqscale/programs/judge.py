"""Samples before the shapes classifier: its four numbers, and how they were made. Not here: its training (`vqscale
classifier`), and what Inception says (metrics/generation.py).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vqscale.metrics import shapes_classifier as shapes
from vqscale.metrics.sample_file import SampleFile
from vqscale.parallel.mesh import Mesh
from vqscale.tokenizer import export
from vqscale.train import shapes_classifier


def judge(
    images: SampleFile, folder: Path | str, mesh: Mesh, advance: Callable[[int, float], None] | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    """(numbers, what the protocol says of the classifier in `folder`). Collective, the same on every rank."""
    classifier, card = shapes_classifier.load(folder, mesh)
    numbers = shapes.judge(images, classifier, mesh, advance)
    about = {
        "shapes classifier": {
            "folder": str(folder),
            "sha256": export.fingerprint(classifier, classifier.config),
            "own accuracy": card["metrics"]["accuracy"],
            "numbers": "recognised as their class, and the Fréchet distance of its features from those of "
            f"{max(shapes.FEWEST_REAL, len(images))} real pictures; _real: the same of {len(images)} other real "
            "pictures of the same classes. No FID, and comparable only by the same classifier",
        }
    }
    return numbers, about
