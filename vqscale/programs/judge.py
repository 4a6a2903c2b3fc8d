"""Samples before the shapes classifier: its four numbers, and how they were made; and what is said of any classifier.
Not here: their training (`vqscale classifier`), and what Inception says (metrics/generation.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vqscale.metrics import shapes_classifier as shapes
from vqscale.metrics.sample_file import SampleFile
from vqscale.parallel.mesh import Mesh
from vqscale.tokenizer import export
from vqscale.train.classifiers import SHAPES


def judge(
    images: SampleFile, folder: Path | str, mesh: Mesh, advance: Callable[[int, float], None] | None = None
) -> tuple[dict[str, float], dict[str, Any]]:
    """(numbers, what the protocol says of the classifier in `folder`). Collective, the same on every rank."""
    classifier, card = SHAPES.load(folder, mesh)
    numbers = shapes.judge(images, classifier, mesh, advance)
    real = max(shapes.FEWEST_REAL, len(images))
    said = (
        f"recognised as their class, and the Fréchet distance of its features from those of {real} real pictures; "
        f"_real: the same of {len(images)} other real pictures of the same classes"
    )
    return numbers, about(folder, classifier, card, said)


def about(folder: Path | str, classifier: Any, card: Mapping[str, Any], numbers: str) -> dict[str, Any]:
    """What a protocol says of the classifier in `folder`, and of its numbers."""
    return {
        str(card["name"]): {
            "folder": str(folder),
            "sha256": export.fingerprint(classifier, classifier.config),
            "own accuracy": card["metrics"]["accuracy"],
            "numbers": f"{numbers}. No FID, and comparable only by the same classifier",
        }
    }
