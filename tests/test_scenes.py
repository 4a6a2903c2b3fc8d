"""Drawn scenes: exact truth of every pixel, occlusion, what is missing on purpose, and the shards that are made."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from vqscale import config as configuration
from vqscale.data.config import ImagesConfig, MediumConfig
from vqscale.data.config_dense import DepthConfig, PanopticConfig, ScenesConfig
from vqscale.data.made import scenes, things
from vqscale.data.made.scenes import draw
from vqscale.data.samples import SampleStream, prepare

STUFF = {category.id for category in ScenesConfig.categories if not category.isthing}


def same(one, other):
    arrays = ((one.picture, other.picture), (one.metres, other.metres), (one.ids, other.ids))
    return all((a == b).all() for a, b in arrays) and one.segments == other.segments


def test_a_scene_is_a_function_of_its_number_and_no_other_is_like_it():
    assert all(same(draw(number, 16, 3), draw(number, 16, 3)) for number in range(5))
    seen = {draw(number, 16, seed).picture.tobytes() for number in range(20) for seed in range(2)}
    assert len(seen) == 40


@pytest.mark.parametrize("size", [8, 32, 64])
def test_segments_are_those_of_the_pixels(size):
    for number in range(60):
        scene = draw(number, size, 1)
        areas = {int(id): int((scene.ids == id).sum()) for id in np.unique(scene.ids) if id}
        assert {segment["id"]: segment["area"] for segment in scene.segments} == areas
        assert all(segment["category_id"] == segment["id"] // 1000 for segment in scene.segments)
        assert all(area >= 9 for area in areas.values())
        crowds = [segment["category_id"] for segment in scene.segments if segment["iscrowd"]]
        assert len(crowds) <= 1
        assert not set(crowds) & STUFF


def test_depth_is_that_of_the_nearest_thing_or_of_the_floor_or_of_what_is_behind():
    """Ray by ray, at the centre of each pixel, from what stands there."""
    size, checked = 24, 0
    for number in range(30):
        scene, standing = _seen(number, size)
        for y, x in np.argwhere(scene.metres > 0).tolist():
            column, row = (x + 0.5) / size, (y + 0.5) / size
            met = [(_metres(one, column, row), one.id) for one in standing.objects if _covers(one, column, row)]
            behind, floor = standing.behind, standing.view.horizon + 1.1 * standing.view.height / standing.behind
            ground = 1.1 * standing.view.height / (row - standing.view.horizon) if row > floor else behind
            metres, segment = min([*met, (ground, None)], key=lambda one: one[0])
            assert scene.metres[y, x] == pytest.approx(metres, rel=1e-9)
            if segment in {one["id"] for one in scene.segments}:
                assert scene.ids[y, x] == segment
            checked += 1
    assert checked > 5000


class _Standing:
    view = objects = behind = None


def _seen(number, size):
    """A scene, and what stood in it."""
    kept = _Standing()
    place, ground = things.objects, scenes._ground

    def standing(rng, view):
        kept.view, kept.objects = view, place(rng, view)
        return kept.objects

    def painted(rng, x, y, view):
        painting = ground(rng, x, y, view)
        kept.behind = painting.metres[0, 0]
        return painting

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes, "objects", standing)
        patch.setattr(scenes, "_ground", painted)
        return draw(number, size, 5), kept


def _covers(one, column, row):
    """Whether the middle of the pixel lies in the outline."""
    return bool(one.distance(*_inside(one, column, row)) < 0)


def _inside(one, column, row):
    return (column - one.centre[0]) / one.radius, (row - one.centre[1]) / one.radius


def _metres(one, column, row):
    u, v = _inside(one, column, row)
    return one.metres - (one.radius_m * (1 - u * u - v * v) ** 0.5 if one.kind == "ball" else 0)


def test_depth_is_missing_in_the_sky_and_on_the_far_side_of_a_jump():
    for number in range(40):
        scene = draw(number, 32, 2)
        sky = scene.ids == 1000 * things.CLASS["sky"]
        assert not scene.metres[sky].any()
        for axis in (0, 1):
            near, other = np.moveaxis(scene.metres, axis, 0)[:-1], np.moveaxis(scene.metres, axis, 0)[1:]
            both = (near > 0) & (other > 0)
            assert (np.abs(near - other)[both] <= 0.5).all()


def test_the_share_of_what_is_missing_void_and_crowded_is_as_told():
    drawn = [draw(number, 64) for number in range(200)]
    missing = np.mean([(scene.metres == 0).mean() for scene in drawn])
    void = np.mean([(scene.ids == 0).any() for scene in drawn])
    crowds = np.mean([any(segment["iscrowd"] for segment in scene.segments) for scene in drawn])
    assert 0.15 < missing < 0.3
    assert 0.35 < void < 0.6
    assert 0.05 < crowds < 0.15


def test_gray_cannot_tell_the_two_hues_of_a_class():
    for thing in things.THINGS.values():
        one, other = (things._hued(thing, hue) for hue in (False, True))
        assert one @ things.LUMINANCE == pytest.approx(other @ things.LUMINANCE)
        assert np.abs(one - other).max() > 0.25
        assert min(one.min(), other.min()) > 0
        assert max(one.max(), other.max()) < 0.96


def test_the_media_make_scenes_and_read_their_truth(tmp_path):
    made = {"source": "scenes", "num_images": 6, "size": 16, "seed": 4}
    common = {"shards": f"{tmp_path}/train-{{0..1}}.tar", "image_size": 16, "num_workers": 0, "make": made}
    common |= {"index_dir": str(tmp_path)}
    asked = [{"medium": "depth"}, {"medium": "panoptic"}, {"medium": "images", "crop": "center"}]
    configs = [configuration.parse(MediumConfig, common | keys) for keys in asked]
    assert [type(config) for config in configs] == [DepthConfig, PanopticConfig, ImagesConfig]
    for config in configs:
        prepare(config)
    assert configs[1].counts() == (5, 5)
    depth, panoptic, images = (next(SampleStream(config, 6, train=False).batches()).samples for config in configs)
    for number in range(6):
        scene = draw(number, 16, 4)
        picture = torch.from_numpy(scene.picture).permute(2, 0, 1) / 127.5 - 1
        for samples in (depth, panoptic, images):
            assert torch.equal(samples[number, :3], picture)
        assert np.abs(depth[number, 3].numpy() - scene.metres).max() <= 0.00051
        assert (panoptic[number, 3].numpy() == scene.ids // 1000).all()
        crowd = {segment["id"] for segment in scene.segments if segment["iscrowd"]}
        assert (panoptic[number, 5].numpy() == np.isin(scene.ids, list(crowd))).all()
        pairs = set(zip(scene.ids.ravel().tolist(), panoptic[number, 4].ravel().tolist(), strict=True))
        assert len(pairs) == len({pair[0] for pair in pairs}) == len({pair[1] for pair in pairs})
    info = json.loads((tmp_path / "_info.json").read_text())
    assert info["depth"] == {"unit_m": 0.001}
    assert [category["name"] for category in info["categories"]][:2] == ["ball", "box"]


def test_shapes_are_still_what_is_made_where_no_source_is_named():
    config = configuration.parse(MediumConfig, {"shards": "x.tar", "make": {"num_images": 5}})
    assert (config.make.source, config.make.num_images) == ("shapes", 5)
    with pytest.raises(configuration.ConfigError, match=r"far is 20\.0 m"):
        configuration.parse(MediumConfig, {"medium": "depth", "shards": "x.tar", "make": {"far": 20.0}})
