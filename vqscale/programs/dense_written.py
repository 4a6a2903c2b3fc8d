"""Predicted segments as files that COCO's own evaluator reads: of each row of the table a folder of PNGs, and a JSON.

    FOLDER/no_code/IMAGE.png    FOLDER/no_code.json    the same of each row that is asked for

They are of the size of the files that they are predictions of, every pixel from the nearest, and `image_id` is what
the panoptic.json of the sample says, or its key: with the shards of a data set that is the number in its annotations.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from torch import Tensor

from vqscale.data.config_dense import PanopticConfig, as_stated
from vqscale.data.panoptic import told
from vqscale.metrics import panoptic_files
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.programs.dense_truth import Files, brought


class Maps:
    """Writes what `dense.measure` gives it (Keep), of the rows in `ways`."""

    def __init__(self, folder: Path, config: PanopticConfig, truth: Files, ways: Collection[str]) -> None:
        self.folder, self.truth, self.ways = folder, truth, ways
        self.categories = as_stated(config.classes())
        self._rows: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}

    def keep(self, way: str, predicted: Tensor, numbers: Tensor) -> None:
        if way not in self._rows:
            return
        for number, truth, one in zip(numbers.tolist(), self.truth.of(numbers.tolist()), predicted, strict=True):
            classes, instances = brought(one, truth).round().long().cpu().numpy()
            ids, info = panoptic_files.described(classes, instances, self.categories)
            at = self.folder / _name(way)
            self._rows[way].append(panoptic_files.write_map(at, self._image_id(number), ids, info))

    def finish(self, mesh: Mesh) -> list[Path]:
        """Write the JSON of each row, of the maps of all ranks; collective. The files of JSON."""
        every = ops.gather_objects(self._rows, mesh.world)
        paths = [self.folder / f"{_name(way)}.json" for way in self._rows]
        if mesh.world.rank == 0:
            for way, path in zip(self._rows, paths, strict=True):
                panoptic_files.write_json(path, [row for rows in every for row in rows[way]], self.categories)
        return paths

    def _image_id(self, number: int) -> int | str:
        reader = self.truth.reader
        said = (told(reader.read(number)[1:]) or {}).get("image_id")
        return said if isinstance(said, int | str) else reader.index.key(number)


def _name(way: str) -> str:
    return way.replace(" ", "_").replace("/", "_of_")
