"""Drawing some ids of images whose others are given, from the command line: a cache, samples, a picture; what is
refused.
"""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import prior_runs
import pytest
import torch
from PIL import Image
from saved_runs import IBQ, small
from test_sample_tools import tool

from vqscale import priors
from vqscale.data.tokens.stream import Cache
from vqscale.programs.sampling.known import Region

CODES, GRID, NUM = prior_runs.CODES, (4, 4), 6
NET = {"width": 16, "num_layers": 1, "num_heads": 2, "ffn_multiple": 16}
REGION = ("--draw-rows", "1-2", "--draw-columns", "0,3")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A tokenizer, a cache of it, a masked and another prior, and a picture. Not to be changed."""
    folder = tmp_path_factory.mktemp("known")
    tokenizer = small(quantizer={**IBQ, "num_codes": CODES})
    tokenizer.save(folder / "tokenizer", {"image_size": 8})
    prior_runs.write_cache(folder / "cache", NUM, 1, unknown=1, grid=GRID, tokenizer=tokenizer.fingerprint)
    prior_runs.write_cache(folder / "other", NUM, 1, grid=GRID)
    for name in ("masked", "autoregressive"):
        config = {"name": name, "num_codes": CODES, "grid": list(GRID), "num_classes": 8, "net": NET}
        priors.build(config).save(folder / name, {"tokenizer": tokenizer.fingerprint})
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "picture.png")
    return folder


def draw(place, out, *words, prior="masked"):
    options = ("--device", "cpu", "--batch", 4, "--num-images", 8, "--steps", 3)
    return tool("sample", place / prior, place / "tokenizer", out, *options[: 8 if prior == "masked" else 6], *words)


def drawn(out):
    with np.load(out / "samples.npz") as file:
        return file["ids"], file["arr_1"]


def changed(ids, given):
    """Where any image has another id than was given."""
    return (ids != given).any(0)


def in_region():
    inside = np.zeros(GRID, bool)
    inside[1:3, [0, 3]] = True
    return inside


def test_the_ids_of_a_cache_stay_outside_of_the_region_and_images_keep_their_classes(place, tmp_path):
    status, said = draw(place, tmp_path / "out", "--known", place / "cache", *REGION)
    assert status == 0, said
    assert "8 images with ids of 6 known ones" in said
    ids, labels = drawn(tmp_path / "out")
    cache = Cache(place / "cache")
    given = np.asarray(cache.ids[:, 0])[np.arange(8) % NUM]
    np.testing.assert_array_equal(changed(ids, given), in_region())
    np.testing.assert_array_equal(labels, cache.labels[np.arange(8) % NUM])
    before = (tmp_path / "out" / "samples.npz").stat().st_mtime_ns
    assert draw(place, tmp_path / "out", "--known", place / "cache", *REGION)[0] == 0
    assert (tmp_path / "out" / "samples.npz").stat().st_mtime_ns == before
    status, said = draw(place, tmp_path / "out", "--known", place / "cache", "--draw-rows", 0)
    assert (status, "settings.known is" in said) == (2, True)
    assert draw(place, tmp_path / "out")[0] == 2
    # and what was drawn is known in the next drawing
    again = draw(place, tmp_path / "again", "--known", tmp_path / "out", "--draw-columns", 1, "--classes", 2)
    assert again[0] == 0, again[1]
    more, labels = drawn(tmp_path / "again")
    np.testing.assert_array_equal(changed(more, ids)[:, [0, 2, 3]], False)
    assert set(labels) == {2}


def test_a_picture_is_encoded_and_a_stopped_drawing_goes_on(place, tmp_path):
    words = ("--known", place / "picture.png", *REGION)
    assert draw(place, tmp_path / "out", *words)[0] == 0
    tokenizer = small(quantizer={**IBQ, "num_codes": CODES})
    pixels = torch.from_numpy(np.asarray(Image.open(place / "picture.png")).copy()).permute(2, 0, 1)[None]
    with torch.no_grad():
        given = tokenizer.encode(pixels / 127.5 - 1).numpy()
    ids, labels = drawn(tmp_path / "out")
    outside = ~in_region()
    np.testing.assert_array_equal(ids[:, outside], np.repeat(given, 8, 0)[:, outside])
    assert set(labels) == {-1}
    # the folder of a drawing that ended after its first batch
    half = tmp_path / "half"
    (half / "parts").mkdir(parents=True)
    facts = json.loads((tmp_path / "out" / "sample.json").read_text())
    (half / "sample.json").write_text(json.dumps({**facts, "state": "begun"}))
    with np.load(tmp_path / "out" / "samples.npz") as file:
        np.savez(half / "parts" / "000000.npz", images=file["arr_0"][:4], labels=file["arr_1"][:4], ids=file["ids"][:4])
    assert "1 of 2 batches are there already" in draw(place, half, *words)[1]
    np.testing.assert_array_equal(drawn(half)[0], ids)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--known", "{}/cache"), "nothing says which are to be drawn: give --draw-rows, --draw-columns or both"),
        (("--draw-rows", "1"), "there is no --known"),
        (("--known", "{}/cache", "--draw-rows", "2-4"), "--draw-rows has 4, and the grid of the prior, 4 x 4 ids"),
        (("--known", "{}/cache", "--draw-columns", "x"), "--draw-columns has 'x': give numbers and ranges"),
        (("--known", "{}/nothing", *REGION), "nothing is no token cache, no finished samples and no picture"),
        (("--known", "{}/masked/model.safetensors", *REGION), "cannot be read as a picture"),
        (("--known", "{}/other", *REGION), "its ids come from the tokenizer with fingerprint"),
        (("--known", "{}/cache", *REGION, "--classes", "9"), "class 9 is none of the prior's"),
    ],
)
def test_what_cannot_be_known_is_said_and_nothing_written(place, tmp_path, words, message):
    status, said = draw(place, tmp_path / "out", *(word.format(place) for word in words))
    assert (status, message in said) == (2, True), said
    assert not (tmp_path / "out" / "sample.json").exists()


def test_known_ids_that_were_damaged_are_said_to_be(place, tmp_path):
    shutil.copytree(place / "cache", tmp_path / "cache")
    path = next((tmp_path / "cache" / "ids").glob("c.0.*"))
    path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])
    status, said = draw(place, tmp_path / "out", "--known", tmp_path / "cache", *REGION)
    assert (status, f"{path} was damaged after the cache was sealed" in said) == (1, True), said


def test_a_prior_with_an_order_of_its_own_refuses_known_ids_before_it_is_read(place, tmp_path):
    status, said = draw(place, tmp_path / "out", "--known", place / "cache", *REGION, prior="autoregressive")
    assert status == 2
    assert re.search(r"--known gives ids, and .*, a prior of name autoregressive, draws all ids in an order", said)


def test_a_region_of_a_grid_with_one_side_is_of_rows():
    assert Region(rows=(1, 2)).of([4]).tolist() == [False, True, True, False]
    with pytest.raises(ValueError, match="--draw-columns is for a grid with columns"):
        Region(columns=(0,)).of([4])
