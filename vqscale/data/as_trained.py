"""How images are read for a tokenizer that is there: as it was trained, unless something else is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def as_trained(
    card: Mapping[str, Any], image_size: int | None, resize: int | None, interpolation: str | None
) -> dict[str, Any]:
    """These keys of ImagesConfig as asked for, or (None) as the card of a tokenizer says, or else 256 pixels,
    bicubic. The card's resize goes with its size. A tokenizer seen through another filter gives other numbers and ids.
    """
    return {
        "image_size": (card.get("image_size") or 256) if image_size is None else image_size,
        "resize": card.get("resize") if image_size is None and resize is None else resize,
        "interpolation": interpolation or card.get("interpolation") or "bicubic",
    }
