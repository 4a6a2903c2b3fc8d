"""Metrics of depth, color and panoptic maps: definitions by hand and by slow twins, sums over ranks, files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from vqscale import signals
from vqscale.data import panoptic
from vqscale.metrics import panoptic_files
from vqscale.metrics.chroma import Colors, chroma
from vqscale.metrics.depth import DepthErrors
from vqscale.metrics.panoptic import PanopticQuality, per_class
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh
from vqscale.signals.config_dense import ColorSignal, DepthSignal, PanopticSignal

NUM_CLASSES, THINGS = 5, (1, 2, 3)


def _metres(*rows):
    return torch.tensor(rows, dtype=torch.float32)[:, None, None]


def _depth(truth, predicted):
    scores = DepthErrors()
    scores.add(_metres(*truth), _metres(*predicted))
    return DepthErrors.from_sums(scores.sums())


def test_depth_by_hand():
    found = _depth([[1, 2]], [[1.25, 2]])
    assert found["delta1"] == 0.5, "a ratio of exactly 1.25 is not within 1.25"
    assert found["delta2"] == found["delta3"] == 1
    assert found["abs_rel"] == pytest.approx(0.125)
    assert found["rmse"] == pytest.approx(0.17678, abs=5e-6)
    assert found["log10"] == pytest.approx(math.log10(1.25) / 2)


def test_rmse_is_a_mean_over_images_and_not_over_pixels():
    assert _depth([[2, 2], [2, 2]], [[2, 2], [4, 4]])["rmse"] == pytest.approx(1.0)


def test_only_pixels_between_a_millimetre_and_ten_metres_count():
    found = _depth([[0, 1e-3, 10, 2.0], [0, 0, 0, 12.0]], [[5, 5, 5, 3.0], [1, 1, 1, 1.0]])
    assert found["rmse"] == pytest.approx(1.0)
    assert (found["images"], found["without_depth"]) == (1, 1)
    nothing = _depth([[0, 0]], [[1, 1]])
    assert math.isnan(nothing["rmse"])
    assert (nothing["images"], nothing["without_depth"]) == (0, 1)


def test_depth_of_other_sides_is_brought_to_the_truth_each_pixel_to_its_nearest():
    scores = DepthErrors()
    truth = torch.arange(1, 9).float().view(1, 1, 1, 8)
    scores.add(torch.cat([torch.zeros(1, 3, 1, 8), truth], 1), truth[..., 1::2])
    assert DepthErrors.from_sums(scores.sums())["rmse"] == pytest.approx(math.sqrt(1 / 2))


def test_chroma_and_psnr_by_hand():
    gray, red = torch.zeros(1, 3, 2, 2), -torch.ones(1, 3, 2, 2)
    red[:, 0] = 1
    half = torch.cat([red[..., :1], gray[..., :1]], -1)
    assert chroma(torch.cat([gray, red])).tolist() == [0, 1]
    assert chroma(half).item() == 0.5
    scores = Colors()
    scores.add(torch.cat([red, gray]), torch.cat([gray, gray + 0.2]))
    found = Colors.from_sums(scores.sums())
    assert found["psnr"] == pytest.approx((10 * math.log10(4) + 10 * math.log10(4 / 0.04)) / 2, abs=1e-5)
    assert (found["chroma"], found["true_chroma"], found["images"]) == (0, 0.5, 2)
    scores.add(gray, gray)  # met exactly: finite
    assert math.isfinite(Colors.from_sums(scores.sums())["psnr"])


# PQ. A row of pixels in letters: each letter is a segment, of a class; `.` is void.


def _maps(row, classes):
    letters = sorted(set(row) - {"."})
    numbers = {letter: place for place, letter in enumerate(letters, 1)}
    crowds = {letter: 1 for letter, kind in classes.items() if isinstance(kind, tuple)}
    kinds = {letter: kind[0] if isinstance(kind, tuple) else kind for letter, kind in classes.items()}
    return torch.tensor([[[table.get(x, 0) for x in row]] for table in (kinds, numbers, crowds)])[None].float()


A, B, CROWD = 1, 2, (1,)
CASES = [
    ("1111111122222222", "999999..88888888", {"1": A, "2": B}, {"9": A, "8": B}, (0.75, 0.75, 1), (1, 1, 1)),
    ("1122", "9.88", {"1": A, "2": B}, {"9": A, "8": B}, (0, 0, 0), (1, 1, 1)),
    ("1111....", "99999999", {"1": A}, {"9": A}, (1, 1, 1), None),
    ("..221111", "99998888", {"1": A, "2": B}, {"9": A, "8": A}, (2 / 3, 1, 2 / 3), (0, 0, 0)),
    ("...21111", "99998888", {"1": A, "2": B}, {"9": A, "8": A}, (1, 1, 1), (0, 0, 0)),
    ("33321111", "99998888", {"1": A, "2": B, "3": CROWD}, {"9": A, "8": A}, (1, 1, 1), (0, 0, 0)),
]


@pytest.mark.parametrize(("truth", "guess", "of_truth", "of_guess", "first", "second"), CASES)
def test_pq_by_hand(truth, guess, of_truth, of_guess, first, second):
    scores = PanopticQuality(NUM_CLASSES, THINGS)
    scores.add(_maps(truth, of_truth), _maps(guess, of_guess)[:, :2])
    rows = per_class(scores.sums())
    for number, expected in ((A, first), (B, second)):
        if expected is None:
            assert rows[number].isnan().all()
        else:
            assert rows[number].tolist() == pytest.approx(expected, abs=1e-12)


def test_a_prediction_of_another_class_on_a_crowd_is_a_false_positive():
    scores = PanopticQuality(NUM_CLASSES, THINGS)
    scores.add(_maps("33321111", {"1": A, "2": B, "3": CROWD}), _maps("99998888", {"9": B, "8": A})[:, :2])
    assert scores.sums()[1:].view(-1, 4)[B].tolist() == [0, 0, 1, 1]


def test_stuff_of_a_class_is_one_segment_and_things_are_not():
    for kind, expected in ((4, 1.0), (A, 0.0)):
        scores = PanopticQuality(NUM_CLASSES, THINGS)
        scores.add(_maps("11111111", {"1": kind}), _maps("99998888", {"9": kind, "8": kind})[:, :2])
        assert scores.from_sums(scores.sums())["pq"] == expected


def _random_maps(draw, truth):
    """(3, 12, 15) classes, instances and crowds in patches, with void; crowds in the truth alone."""
    coarse = draw.integers(0, 7, (4, 5)).repeat(3, 0).repeat(3, 1)
    kinds = np.append(0, draw.integers(1, NUM_CLASSES + 1, 6))[coarse]
    instances = coarse.copy()
    crowds = truth & np.isin(kinds, (1, 4)) & (coarse % 2 == 0)
    instances[crowds] = 9
    if not truth:
        noise = draw.random(coarse.shape) < 0.15
        kinds[noise], instances[noise] = draw.integers(0, NUM_CLASSES + 1, noise.sum()), 7
    return np.stack([kinds, instances, crowds])


def _slowly(pairs):
    """PQ from the rules, segment by segment as sets of pixels: nothing is shared with the fast form."""
    sums = {kind: [0.0, 0, 0, 0] for kind in range(1, NUM_CLASSES + 1)}
    for truth, guess in pairs:
        true, predicted, void = {}, {}, set()
        for pixel in np.ndindex(truth.shape[1:]):
            kind, number, crowd = (int(x[pixel]) for x in truth)
            if kind == 0:
                void.add(pixel)
            else:
                true.setdefault((kind, "crowd" if crowd else number), set()).add(pixel)
            kind, number = (int(x[pixel]) for x in guess[:2])
            if kind:
                predicted.setdefault((kind, number if kind in THINGS else 0), set()).add(pixel)
        met = set()
        for (kind, number), pixels in true.items():
            if number == "crowd":
                continue
            hits = 0
            for segment, others in predicted.items():
                union = len(others) + len(pixels) - len(pixels & others) - len(others & void)
                if segment[0] == kind and 2 * len(pixels & others) > union:
                    sums[kind][0] += len(pixels & others) / union
                    met.add(segment)
                    hits += 1
            assert hits < 2
            sums[kind][1 if hits else 3] += 1
        for segment, pixels in predicted.items():
            excused = pixels & (void | true.get((segment[0], "crowd"), set()))
            if segment not in met and 2 * len(excused) <= len(pixels):
                sums[segment[0]][2] += 1
    qualities = {}
    for kind, (iou, tp, fp, fn) in sums.items():
        if tp + fp + fn:
            weight = tp + 0.5 * fp + 0.5 * fn
            qualities[kind] = (iou / weight, iou / tp if tp else 0, tp / weight)
    found = {"images": len(pairs)}
    for name, members in (("", qualities), ("_things", THINGS), ("_stuff", (4, 5))):
        chosen = [qualities[kind] for kind in members if kind in qualities]
        for column, quality in enumerate(("pq", "sq", "rq")):
            found[quality + name] = sum(row[column] for row in chosen) / len(chosen)
    return found


def _pairs(count=40):
    """Truths and predictions that resemble them: the truth itself with patches of another map."""
    draw = np.random.default_rng(5)
    pairs = []
    for _ in range(count):
        truth, other = _random_maps(draw, True), _random_maps(draw, False)
        guess, edge = truth.copy(), draw.integers(2, 15)
        guess[:, :, edge:] = other[:, :, edge:]
        pairs.append((truth, guess))
    return pairs


def _quality(pairs):
    scores = PanopticQuality(NUM_CLASSES, THINGS)
    truths, guesses = (torch.from_numpy(np.stack([pair[side] for pair in pairs])).float() for side in (0, 1))
    scores.add(torch.cat([torch.zeros(len(pairs), 3, 12, 15), truths], 1), guesses[:, :2])
    return scores


def test_pq_is_that_of_the_rules_written_out_on_maps_with_void_and_crowds():
    pairs = _pairs()
    scores, expected = _quality(pairs), _slowly(pairs)
    assert 0.1 < expected["pq_stuff"] < expected["sq"] < 1
    assert 0.1 < expected["pq_things"] < 1
    assert scores.from_sums(scores.sums()) == pytest.approx(expected, rel=0, abs=1e-12)
    excused = [pair for pair in pairs if pair[0][2].any()]
    assert len(excused) > 10


def test_nothing_seen_is_not_a_number_and_unknown_classes_are_refused():
    scores = PanopticQuality(NUM_CLASSES, THINGS)
    scores.add(torch.zeros(0, 6, 4, 4), torch.zeros(0, 2, 4, 4))
    assert math.isnan(scores.from_sums(scores.sums())["pq"])
    with pytest.raises(ValueError, match="a prediction has the classes 6 to 6, and there are 0 to 5"):
        scores.add(torch.zeros(1, 6, 1, 1), torch.full((1, 2, 1, 1), 6.0))
    with pytest.raises(ValueError, match=r"things \[6\] are none of 1 to 5"):
        PanopticQuality(NUM_CLASSES, [1, 6])


def _divided(world, count=11):
    """Every metric over this rank's share of the samples, added over ranks."""
    mesh = Mesh(world)
    rank, size = mesh.world.rank, mesh.world.size
    draw = torch.Generator().manual_seed(1)
    truth, guess = (torch.rand(count, 4, 6, 5, generator=draw) * 12 for _ in range(2))
    first, last = count * rank // size, count * (rank + 1) // size
    depths, colors = DepthErrors(), Colors()
    for number in range(first, last):
        depths.add(truth[number : number + 1], guess[number : number + 1])
    colors.add(truth[first:last, :3] / 6 - 1, guess[first:last, :3] / 6 - 1)
    quality = _quality(_pairs(count)[first:last])
    found = [scores.from_sums(ops.sum_over(scores.sums(), mesh.world)) for scores in (depths, colors, quality)]
    return {name: value for numbers in found for name, value in numbers.items()} | _of_signals(mesh)


def _of_signals(mesh, count=3):
    """Those of each signal over this rank's share of the samples, which of four ranks one has not."""
    draw = torch.Generator().manual_seed(2)
    mine = slice(count * mesh.world.rank // mesh.world.size, count * (mesh.world.rank + 1) // mesh.world.size)
    images, metres = torch.rand(count, 3, 6, 6, generator=draw) * 2 - 1, torch.rand(count, 1, 6, 6, generator=draw) * 11
    classes, instances = torch.arange(36) % 5, torch.arange(36) % 5 * torch.arange(1, 4)[:, None]
    maps = [x.expand(count, 36).view(count, 1, 6, 6) for x in (classes, instances, 0 * classes)]
    samples = {
        DepthSignal(): torch.cat([images, metres], 1),
        ColorSignal(): images,
        PanopticSignal(num_things=2, num_stuff=2, num_instances=3): torch.cat([images, *maps], 1),
    }
    found = {}
    for config, truth in samples.items():
        signal = signals.build(config)
        sums, output = signal.sums(mesh), torch.randn(count, sum(config.labels), 6, 6, generator=draw)
        sums.add(truth[mine], signal.predict(output[mine]))
        found |= {f"{config.name}/{name}": value for name, value in sums.numbers().items()}
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_ranks_find_the_same_numbers(ranks):
    alone = _divided(1)
    assert not any(math.isnan(value) for value in alone.values())
    assert alone["panoptic/beyond_instances"] == (4 - 2) + (8 - 2) + (12 - 2)
    for world in (2, 4):
        for found in ranks(world, _divided, world):
            assert found == pytest.approx(alone, rel=1e-12)


# Files of panoptic maps.

CATEGORIES = [
    {"id": number, "name": name, "isthing": int(place in THINGS)}
    for place, (number, name) in enumerate([(7, "ball"), (9, "box"), (11, "cone"), (100, "floor"), (200, "wall")], 1)
]


def test_ids_are_three_bytes_of_a_pixel():
    ids = np.array([[0, 1, 255, 256, 65536, 2**24 - 1]])
    pixels = panoptic.id_to_rgb(ids)
    assert pixels[0, 3].tolist() == [0, 1, 0]
    assert pixels[0, 4].tolist() == [0, 0, 1]
    assert (panoptic.rgb_to_id(pixels) == ids).all()


def test_what_is_written_is_what_the_official_evaluator_reads(tmp_path):
    """Read back as it does: ids from the PNG, categories from the JSON, the two naming the same ids."""
    kinds = np.array([[1, 1, 1, 4, 4, 0], [1, 2, 4, 4, 5, 0]])
    instances = np.array([[1, 1, 2, 3, 5, 9], [1, 3, 8, 3, 4, 0]])
    folder = tmp_path / "panoptic_val"
    rows = [panoptic_files.write_map(folder, 42, *panoptic_files.described(kinds, instances, CATEGORIES))]
    panoptic_files.write_json(tmp_path / "panoptic_val.json", rows * 2, CATEGORIES)
    told = json.loads((tmp_path / "panoptic_val.json").read_text())
    assert told["categories"] == CATEGORIES
    (row,) = told["annotations"]
    assert (row["image_id"], row["file_name"]) == (42, "000000000042.png")
    pixels = np.asarray(Image.open(folder / row["file_name"])).astype(np.uint32)
    ids = pixels[..., 0] + 256 * pixels[..., 1] + 256 * 256 * pixels[..., 2]
    info = {segment["id"]: segment for segment in row["segments_info"]}
    assert set(np.unique(ids)) - {0} == set(info)
    assert (ids[kinds == 0] == 0).all()
    seen = {number: segment["category_id"] for number, segment in info.items()}
    assert sorted(seen.values()) == [7, 7, 9, 100, 200], "stuff is one segment of its class, things are as they were"
    assert {ids[0, 0], ids[1, 0]} == {ids[0, 1]} != {ids[0, 2]}
    wall = info[ids[1, 4]]
    assert (wall["area"], wall["bbox"]) == (1, [4, 1, 1, 1])
    floor = info[ids[0, 3]]
    assert (floor["iscrowd"], floor["area"], floor["bbox"]) == (0, 4, [2, 0, 3, 2])
