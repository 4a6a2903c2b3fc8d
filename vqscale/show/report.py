"""An evaluation as a folder: result.json for machines, index.html for people, with its pictures in it.

FOLDER/result.json          numbers, what was measured, how, and by which code
FOLDER/index.html           the same as one self-contained page
FOLDER/reconstructions.png  originals above reconstructions          FOLDER/usage.png  how often codes were taken
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vqscale.disk import files
from vqscale.metrics.generation import FeatureNetwork
from vqscale.show import page, pictures

FEW = 10_000
FORMS = {
    "usage": "{:.2%}",
    "recognised": "{:.2%}",
    "recognised_real": "{:.2%}",
    "recognised_noise": "{:.2%}",
    "recognised_samples": "{:.2%}",
    "samples": "{:,.0f}",
    "ceiling": "{:.2%}",
    "images": "{:,.0f}",
    "broken": "{:.0f}",
    "enlarged": "{:.0f}",
    "dead": "{:,.0f}",
    "seconds": "{:,.1f}",
    "tokens_per_s": "{:.2f}",
    "cut": "{:.0f}",
    "pesq_without": "{:.0f}",
    "stoi_without": "{:.0f}",
    "voicing_f1_without": "{:.0f}",
    "moved_bf16": "{:.3%}",
    "moved_pixel": "{:.2%}",
    "moved_token": "{:.2%}",
}


def write(
    folder: Path | str,
    title: str,
    result: Mapping[str, Any],
    shown: Mapping[str, pictures.Picture],
    more: Sequence[tuple[str, str]] = (),
) -> Path:
    """Write the folder from a result, whose numbers are under "numbers", pictures by name, and further parts of the
    page (heading, HTML); returns the page."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files.write(folder / "result.json", text(result) + "\n")
    figures = []
    for name, picture in shown.items():
        path = pictures.save(folder / f"{name.split(maxsplit=1)[0]}.png", picture)
        figures.append((name.capitalize(), page.picture(path, name)))
    rest = {key: value for key, value in result.items() if key not in ("numbers", "notes")}
    notes = page.paragraphs(result.get("notes", ()), failed=True)
    rows = [{"": name, "value": line} for name, line in lines(result["numbers"])]
    parts = [
        ("Numbers", page.table(rows, {"": "{}", "value": "{}"}) + notes),
        *more,
        *figures,
        ("How", page.blocks([text(rest)])),
    ]
    files.write(folder / "index.html", page.page(title, parts))
    return folder / "index.html"


def tell(
    result: Mapping[str, Any],
    folder: str | None,
    title: str,
    shown: Mapping[str, pictures.Picture],
    more: Sequence[tuple[str, str]] = (),
) -> str:
    """The lines for a terminal; writes the folder too, if one is given."""
    told = [f"{name} {value}" for name, value in lines(result["numbers"])]
    told += [f"note: {note}" for note in result["notes"]]
    if folder:
        at = write(folder, title, result, shown, more)
        told.append(f"page: {at}, numbers: {at.with_name('result.json')}")
    return "\n".join(told)


def about_inception(network: FeatureNetwork | None, preprocessing: str) -> dict[str, Any]:
    """Which Inception, for the protocol; nothing without one."""
    if network is None:
        return {}
    how = {"preprocessing": preprocessing, "arithmetic": "float32 in torch, which is not ADM's TensorFlow graph"}
    return {"inception": {**network.facts, **how}}


def file(path: str) -> dict[str, str]:
    """Which file, for the protocol: its path and its sha256."""
    with open(path, "rb") as content:
        return {"file": path, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def notes(numbers: Mapping[str, float], network: FeatureNetwork | None, broken: Sequence[str] = ()) -> list[str]:
    """What a reader must know before comparing the numbers with others'. broken: why some could not be read."""
    found, images = [], int(numbers["images"])
    if numbers.get("broken"):
        found.append(f"{numbers['broken']:.0f} images could not be read and are in no number: {'; '.join(broken)}")
    if numbers.get("enlarged"):
        found.append(f"{numbers['enlarged']:.0f} images had a shorter side than was asked for, and were enlarged")
    if network is not None and not network.facts["published"]:
        found.append("the weights of Inception are not the published ones: no number made with them compares with FIDs")
    elif network is not None and images < FEW:
        found.append(f"FID depends on the number of images: that of {images} compares only with that of as many")
    return found


def lines(numbers: Mapping[str, float]) -> list[tuple[str, str]]:
    """(name, number as text) of each."""
    return [(name, FORMS.get(name, "{:.4f}").format(value)) for name, value in numbers.items()]


def text(result: Mapping[str, Any]) -> str:
    """JSON, with null for what is not finite, which JSON does not have."""
    return json.dumps(finite(result), indent=1, allow_nan=False)


def finite(value: Any) -> Any:
    """The same with None for what is not finite."""
    if isinstance(value, Mapping):
        return {key: finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
