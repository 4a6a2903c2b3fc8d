"""Panoptic quality (Kirillov et al. 2019) by COCO's rules: PQ, SQ and RQ of all classes, of things and of stuff, as
sums over a data set on many ranks.

A panoptic map is, per pixel, a class (1 .. num_classes, 0 is void) and the number of an instance in it; a segment is
the pixels of one class and number. In the truth a segment may be a crowd, whose members are not told apart. Files that
COCO's own evaluator reads are panoptic_files.py's.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SPACE = 1 << 32  # a segment's number is class * _SPACE + instance
QUALITIES = ("pq", "sq", "rq")


class Segments(NamedTuple):
    """The segments of one map: which each pixel is of, and what they are. The first is void, and may be empty."""

    of_pixel: NDArray[np.int64]  # (pixels,)
    classes: NDArray[np.int64]  # (n,)
    crowd: NDArray[np.bool_]  # (n,)


def segments(
    classes: NDArray[np.integer], instances: NDArray[np.integer], crowd: NDArray[np.bool_] | None = None
) -> Segments:
    """The segments of (H, W) classes and instances from 0 on, and whether each is a crowd; None where none is."""
    kind = classes.astype(np.int64).ravel()
    number = np.where(kind > 0, kind * _SPACE + instances.astype(np.int64).ravel(), 0)
    known, of_pixel = np.unique(np.append(number, 0), return_inverse=True)
    is_crowd = np.zeros(len(known), bool)
    if crowd is not None:
        is_crowd[of_pixel[:-1][crowd.ravel()]] = True
    return Segments(of_pixel[:-1], known // _SPACE, is_crowd & (known > 0))


def counts(truth: Segments, predicted: Segments, num_classes: int) -> NDArray[np.float64]:
    """(num_classes + 1, 4): of each class the sum of IoU of matched segments, true positives, false positives and false
    negatives of one image; the row of void stays 0.

    A pair matches where classes agree, the true one is no crowd, and |both| / union > 1/2, union = |predicted| + |true|
    - |both| - |predicted on void|. A predicted segment without a match is a false positive unless more than half of it
    lies on void and the crowd of its class; a true one without a match is a false negative unless it is a crowd.
    """
    shape = (len(truth.classes), len(predicted.classes))
    both = np.bincount(truth.of_pixel * shape[1] + predicted.of_pixel, minlength=shape[0] * shape[1]).reshape(shape)
    area_true, area = both.sum(1), both.sum(0)
    on_void = both[truth.classes == 0].sum(0)
    alike = (truth.classes[:, None] == predicted.classes) & (predicted.classes > 0)
    union = area_true[:, None] + area - both - on_void
    iou = np.where(alike & ~truth.crowd[:, None], both / np.maximum(union, 1), 0.0)
    matched = iou > 0.5
    on_crowd = (both * (alike & truth.crowd[:, None])).sum(0)
    ignored = (on_void + on_crowd) / np.maximum(area, 1) > 0.5
    false_positive = (predicted.classes > 0) & ~matched.any(0) & ~ignored
    false_negative = (truth.classes > 0) & ~truth.crowd & ~matched.any(1)

    def by_class(classes: NDArray[np.int64], weights: Any) -> NDArray[Any]:
        return np.bincount(classes, weights.astype(np.float64), num_classes + 1)

    best = np.where(matched, iou, 0.0).max(1)
    columns = [by_class(truth.classes, best), by_class(truth.classes, matched.any(1))]
    columns += [by_class(predicted.classes, false_positive), by_class(truth.classes, false_negative)]
    return np.stack(columns, 1)


def merge_stuff(classes: NDArray[np.integer], instances: NDArray[np.integer], things: Collection[int]) -> NDArray:
    """The instances with 0 on stuff, of which a prediction has one segment of each class, as COCO's files have."""
    return np.where(np.isin(classes, list(things)), instances, 0)


class PanopticQuality:
    """Sums over the images of this rank, made so that adding the `sums()` of all ranks gives the data set's.

        total = ops.sum_over(quality.sums(), mesh.world)
        quality.from_sums(total)   # {"pq": 0.43, "sq": 0.78, "rq": 0.53, "pq_things": ..., "images": 5000.0}

    Nothing is communicated here. `things` are the classes that have instances, the others are stuff.
    """

    def __init__(self, num_classes: int, things: Collection[int], device: torch.device | str = "cpu") -> None:
        unknown = sorted(set(things) - set(range(1, num_classes + 1)))
        if unknown:
            raise ValueError(f"the classes of things {unknown} are none of 1 to {num_classes}: change the categories")
        self.num_classes, self.things = num_classes, frozenset(things)
        self._sums = torch.zeros(1 + 4 * (num_classes + 1), dtype=torch.float64, device=device)

    def add(self, samples: Tensor, predicted: Tensor) -> None:
        """Count samples (B, 6, H, W), of the medium panoptic: image, class, instance, 1 in a crowd; and predictions (B,
        2, H, W), class and instance. ValueError for a class above num_classes.
        """
        maps = [x.round().long().cpu().numpy() for x in (samples[:, -3:], predicted)]
        for name, found in zip(("truth", "prediction"), maps, strict=True):
            if found[:, 0].size and not 0 <= found[:, 0].min() <= found[:, 0].max() <= self.num_classes:
                raise ValueError(
                    f"a {name} has the classes {found[:, 0].min()} to {found[:, 0].max()}, and there are 0 to "
                    f"{self.num_classes}, 0 void: give labels and categories of one data set"
                )
        for (kind, number, crowd), (its_kind, its_number) in zip(*maps, strict=True):
            truth = segments(kind, number, crowd > 0)
            guess = segments(its_kind, merge_stuff(its_kind, its_number, self.things))
            self._sums[1:] += self._moved(counts(truth, guess, self.num_classes))
        self._sums[0] += len(samples)

    def _moved(self, counted: NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(counted.ravel()).to(self._sums.device)

    def sums(self) -> Tensor:
        """(1 + 4 (num_classes + 1),) float64 of this rank: images, then `counts` of all of them, row after row."""
        return self._sums.clone()

    def from_sums(self, sums: Tensor) -> dict[str, float]:
        """PQ = sum IoU / (TP + FP/2 + FN/2), SQ = sum IoU / TP and RQ = TP / (TP + FP/2 + FN/2), each a mean over the
        classes that were in truth or prediction; nan where none was."""
        rows, found = per_class(sums), dict[str, float]()
        seen = ~rows[:, 0].isnan()
        for name, members in self._groups().items():
            chosen = rows[[number for number in members if seen[number]]]
            for column, quality in enumerate(QUALITIES):
                found[quality + name] = float(chosen[:, column].mean())
        return found | {"images": float(sums[0])}

    def _groups(self) -> dict[str, list[int]]:
        every = list(range(1, self.num_classes + 1))
        things = [number for number in every if number in self.things]
        return {"": every, "_things": things, "_stuff": [number for number in every if number not in self.things]}


def per_class(sums: Tensor) -> Tensor:
    """(num_classes + 1, 3) float64 from sums: PQ, SQ and RQ of each class, nan of one that no image had."""
    iou, tp, fp, fn = sums[1:].cpu().reshape(-1, 4).unbind(1)
    weight = tp + fp / 2 + fn / 2
    return torch.stack([iou / weight, torch.where(weight > 0, iou / tp.clamp(min=1), torch.nan), tp / weight], 1)
