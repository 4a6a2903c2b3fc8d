"""Where figures are drawn: matplotlib's Agg canvas, in memory, without the state that pyplot keeps for a process."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt


def figure(width: float, height: float, dpi: int = 110, panels: int = 1) -> tuple[Any, list[Any]]:
    """An empty figure of so many inches, and the axes of its panels, side by side."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # lazily: it costs half a second
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(drawn)
    return drawn, list(drawn.subplots(1, panels, squeeze=False).flat)


def png(drawn: Any) -> bytes:
    held = io.BytesIO()
    drawn.savefig(held, format="png")
    return held.getvalue()


def pixels(drawn: Any) -> npt.NDArray[np.uint8]:
    """uint8 of height x width x 3."""
    drawn.canvas.draw()
    return np.asarray(drawn.canvas.buffer_rgba())[..., :3].copy()
