"""Drawing images from a prior: the same on any number of processes and after any interruption, and what is refused."""

from __future__ import annotations

import json
import os
import re
import signal
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import at_call, hear
from PIL import Image
from saved_runs import small

from vqscale import signals
from vqscale.config.schema import fields_of
from vqscale.data.tokens import write as writing
from vqscale.data.tokens.stream import Cache
from vqscale.disk.owner import own
from vqscale.metrics.sample_file import SampleFile
from vqscale.parallel.mesh import Mesh
from vqscale.parallel.spawn import RankError
from vqscale.priors.base import Prior
from vqscale.priors.config import GuidedSampleConfig
from vqscale.priors.config.autoregressive import AutoregressiveConfig, AutoregressiveSampleConfig
from vqscale.programs.sampling import drawn_cache
from vqscale.programs.sampling import folder as sample_folder
from vqscale.programs.sampling.draw import check, sample, summary
from vqscale.programs.sampling.request import SampleRequest, parse_classes
from vqscale.run import folder as run_folder
from vqscale.seed import derive
from vqscale.signals.config import ImagesSignal

CODES, GRID = 13, (4, 4)


class Rule:
    """A prior of which every id is known: a function of the seed, the image's number, its class and the position."""

    num_ids, grid = 1, GRID
    num_codes, num_classes = CODES, 5
    config = AutoregressiveConfig()
    sample_config = Prior.sample_config

    def __init__(self, made_by: str | None = None) -> None:
        self.card = {"tokenizer": made_by} if made_by else {}
        self.fingerprint = "f00d"
        self.asked: list[tuple] = []

    def sample(self, condition_B, settings, *, numbers_B, seed):
        self.asked.append((numbers_B.tolist(), seed, settings))
        wanted = zip(numbers_B.tolist(), condition_B.tolist(), strict=True)
        rows = [[derive(seed, n, c, at, str(settings.guidance)) % CODES for at in range(16)] for n, c in wanted]
        return torch.tensor(rows).view(-1, *GRID)


def request(**others) -> SampleRequest:
    """A request for images, in which some fields, of it or of the prior's SampleConfig, have other values."""
    how = {key: others.pop(key) for key in list(others) if key in fields_of(AutoregressiveSampleConfig)}
    how = AutoregressiveSampleConfig(**{"guidance": 1.5, **how})
    return SampleRequest(**{"num_images": 23, "classes": (1, 4, 0), "how": how, "batch": 4, "seed": 3, **others})


def draw(folder: Path, codes: int = 1, before=None, **others):
    """What `sample` answered in this process, which may be one of several."""
    torch.set_num_threads(1)
    rank = int(os.environ.get("RANK", "0"))
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    mesh = Mesh(world // codes, codes)
    with pytest.MonkeyPatch.context() as changes:
        if before is not None:
            before(rank, changes)
        return sample(Rule(), small(mesh), folder, mesh, request(**others))


def at(target: str, number: int, on_rank: int, action, rank: int, changes) -> None:
    """For `before`: an action on one rank before the number-th call of module:Class.method."""
    module, _, path = target.partition(":")
    owner = __import__(module, fromlist=["x"])
    for part in path.split(".")[:-1]:
        owner = getattr(owner, part)
    changes.setattr(owner, path.split(".")[-1], getattr(owner, path.split(".")[-1]))  # put back afterwards
    at_call(target, number, action, on_rank, rank)


MAKE = "vqscale.programs.sampling.draw:_Work.make_batch"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The samples made by one process to which nothing happened."""
    out = tmp_path_factory.mktemp("whole") / "samples"
    assert draw(out).state == "sampled"
    return out


def test_what_is_drawn_are_the_decoded_ids_of_every_image(whole):
    with np.load(whole / "samples.npz") as file:
        images, labels, ids = file["arr_0"], file["arr_1"], file["ids"]
    assert labels.tolist() == [(1, 4, 0)[n % 3] for n in range(23)]
    for number in range(23):
        rule = [derive(3, number, (1, 4, 0)[number % 3], at, "1.5") % CODES for at in range(16)]
        assert ids[number].flatten().tolist() == rule
    pixels = small().decode(torch.from_numpy(ids)).clamp(-1, 1)
    expected = ((pixels + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert images.dtype == np.uint8
    assert images.shape == (23, 8, 8, 3)
    assert np.abs(images.astype(int) - expected).max() <= 1  # other batches, other rounding
    assert len(np.unique(images)) > 50
    assert sorted(path.name for path in whole.iterdir()) == [".lock", "grid.png", "sample.json", "samples.npz"]


def test_the_file_is_what_evaluators_read(whole):
    file = SampleFile(whole / "samples.npz")
    with np.load(whole / "samples.npz") as arrays:
        assert arrays.files[:2] == ["arr_0", "arr_1"]
        together = torch.cat([part for _, part in file.batches(5)]).permute(0, 2, 3, 1)
        np.testing.assert_array_equal(together, arrays["arr_0"])


def test_the_folder_says_what_it_is(whole):
    facts = json.loads((whole / "sample.json").read_text())
    assert facts["state"] == "done"
    assert facts["settings"]["guidance"] == 1.5
    assert facts["prior"]["fingerprint"] == "f00d"
    assert facts["tokenizer"]["fingerprint"] == small().fingerprint
    assert facts["made"]["images"] == 23
    assert facts["made"]["images_per_s"] > 0
    assert facts["made"]["processes"] == 1


def test_the_grid_has_a_row_for_every_class(whole):
    with np.load(whole / "samples.npz") as file:
        images = file["arr_0"]
    drawn = np.asarray(Image.open(whole / "grid.png"))
    assert drawn.shape == (3 * 8 * 16, 7 * 8 * 16, 3)  # 23 images of 3 classes: 7 of each at least; 16 pixels a pixel
    for row in range(3):
        for column in range(7):
            tile = drawn[row * 128 : row * 128 + 128 : 16, column * 128 : column * 128 + 128 : 16]
            np.testing.assert_array_equal(tile, images[column * 3 + row])


@pytest.mark.parametrize(
    ("count", "classes", "shape"), [(2, 3, (2, 1)), (3, 3, (3, 1)), (5, 3, (3, 1)), (6, 3, (3, 2))]
)
def test_grids_of_few_images_have_no_holes(tmp_path, count, classes, shape):
    facts = {"settings": {"num_images": count, "classes": list(range(classes)), "batch": 2}}
    (tmp_path / "parts").mkdir()
    for batch in range(-(-count // 2)):
        part = np.full((min(2, count - 2 * batch), 128, 128, 3), 200, np.uint8)
        sample_folder.write_part(tmp_path, batch, images=part)
    parts = [sample_folder.part(tmp_path, batch) for batch in range(-(-count // 2))]
    picture = sample_folder.grid(parts, facts["settings"], signals.build(ImagesSignal()))
    assert picture.shape == (128 * shape[0], 128 * shape[1], 3)
    assert (picture == 200).all()


@pytest.mark.dist
@pytest.mark.parametrize(("world", "codes"), [(2, 1), (2, 2)])
def test_any_number_of_processes_draws_the_same(whole, tmp_path, ranks, world, codes):
    answers = ranks(world, draw, tmp_path / "out", codes)
    assert [answer.state for answer in answers] == ["sampled"] * world
    if codes == 1:
        assert (tmp_path / "out" / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()
    with np.load(tmp_path / "out" / "samples.npz") as mine, np.load(whole / "samples.npz") as theirs:
        np.testing.assert_array_equal(mine["ids"], theirs["ids"])
        assert np.abs(mine["arr_0"].astype(int) - theirs["arr_0"]).max() <= 1


@pytest.mark.dist
def test_stopped_on_two_processes_and_continued_on_one(whole, tmp_path, ranks):
    stop = partial(at, MAKE, 2, 1, partial(hear, signal.SIGUSR1))
    first, _ = ranks(2, draw, tmp_path, 1, stop)
    assert (first.state, first.reason, first.missing, first.images) == ("stopped", "SIGUSR1", 2, 16)
    assert "2 batches are missing" in summary(first, tmp_path, request(), 2)
    assert len(list((tmp_path / "parts").iterdir())) == 4
    assert not (tmp_path / "samples.npz").exists()
    (tmp_path / "parts" / "000001.tmp").write_bytes(b"half")
    again = draw(tmp_path)
    assert (again.state, again.images) == ("sampled", 7)
    assert (tmp_path / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()
    assert draw(tmp_path).state == "already"


def test_a_file_stop_is_heard_and_a_damaged_batch_made_again(whole, tmp_path):
    stop = partial(at, MAKE, 3, 0, lambda: (tmp_path / "STOP").touch())
    assert draw(tmp_path, before=stop).reason == "the file STOP"
    assert not (tmp_path / "STOP").exists()
    part = sample_folder.part(tmp_path, 1)
    part.write_bytes(part.read_bytes()[:-200])
    with pytest.raises(run_folder.RunError, match=r"000001.npz was damaged .* the same command makes it again"):
        draw(tmp_path)
    assert draw(tmp_path).images == 4
    assert (tmp_path / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """The samples of `whole` as ids alone."""
    out = tmp_path_factory.mktemp("cached") / "samples"
    assert draw(out, ids_only=True).state == "sampled"
    return out


def _ids(folder):
    return draw(folder, ids_only=True)


def _arrays(cache: Path) -> dict[str, bytes]:
    """Every file of a cache that follows from what was drawn."""
    found = {str(path.relative_to(cache)): path.read_bytes() for path in cache.rglob("*") if path.is_file()}
    return {name: x for name, x in found.items() if not name.startswith("ledger")}


def test_ids_alone_are_a_token_cache_that_says_who_has_drawn_them(whole, cached):
    assert sorted(path.name for path in cached.iterdir()) == [".lock", "cache", "sample.json"]
    cache = Cache(cached / "cache")
    with np.load(whole / "samples.npz") as file:
        np.testing.assert_array_equal(cache.ids[:, 0], file["ids"])
        np.testing.assert_array_equal(cache.labels, file["arr_1"])
    assert cache.key(12) == "000012"
    assert (cache.card.prior, cache.card.tokenizer) == ("f00d", small().fingerprint)
    assert draw(cached, ids_only=True).state == "already"
    for others in ({"ids_only": False}, {"ids_only": True, "seed": 4}):
        with pytest.raises(ValueError, match="holds other samples"):
            draw(cached, **others)
    with pytest.raises(ValueError, match="leave out --ids or --resize"):
        check(Rule(), small(), request(ids_only=True, resize=16))


@pytest.mark.dist
def test_two_processes_write_the_same_cache_and_a_kill_before_its_seal_loses_nothing(cached, tmp_path, ranks):
    assert [answer.state for answer in ranks(2, _ids, tmp_path / "two")] == ["sampled"] * 2
    assert _arrays(tmp_path / "two" / "cache") == _arrays(cached / "cache")
    with pytest.MonkeyPatch.context() as changes:
        changes.setattr(writing, "seal", lambda *words: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw(tmp_path / "torn", ids_only=True)
    assert not (tmp_path / "torn" / "cache" / "manifest.json").exists()
    assert draw(tmp_path / "torn", ids_only=True).images == 0
    assert _arrays(tmp_path / "torn" / "cache") == _arrays(cached / "cache")
    assert len(list((tmp_path / "torn" / "cache" / "ledger").iterdir())) == 1


def test_a_cache_in_many_storage_shards_is_that_of_one(cached, tmp_path, monkeypatch):
    monkeypatch.setattr(drawn_cache, "storage_for", lambda count: 5)
    draw(tmp_path, ids_only=True)
    small_ones, one = Cache(tmp_path / "cache"), Cache(cached / "cache")
    assert (small_ones.card.num_shards, one.card.num_shards) == (5, 1)
    np.testing.assert_array_equal(small_ones.ids[:], one.ids[:])
    (tmp_path / "cache" / "note.txt").write_text("mine")
    sample(Rule(), small(), tmp_path, Mesh(), request(), overwrite=True)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["note.txt"]
    assert (tmp_path / "samples.npz").exists()


def test_other_settings_are_refused_and_may_overwrite(tmp_path):
    draw(tmp_path)
    with pytest.raises(ValueError, match=r"holds other samples .*\n  settings.guidance is 2.0, and was 1.5\ngive"):
        draw(tmp_path, guidance=2.0)
    other = Rule()
    other.fingerprint = "beef"
    with pytest.raises(ValueError, match=r'prior.fingerprint is "beef", and was "f00d"'):
        sample(other, small(), tmp_path, Mesh(), request())
    before = (tmp_path / "samples.npz").read_bytes()
    done = sample(Rule(), small(), tmp_path, Mesh(), request(guidance=2.0), overwrite=True)
    assert done.images == 23
    assert (tmp_path / "samples.npz").read_bytes() != before
    same = sample(Rule(), small(), tmp_path, Mesh(), request(guidance=2.0), overwrite=True)
    assert same.state == "already"


def test_a_folder_that_another_process_writes_is_refused(tmp_path):
    with own(tmp_path, "samples"), pytest.raises(ValueError, match="another process is writing samples"):
        draw(tmp_path)
    assert draw(tmp_path).state == "sampled"


@pytest.mark.dist
def test_refusals_reach_all_ranks(tmp_path, ranks):
    draw(tmp_path)
    with pytest.raises(RankError, match=r"ValueError: .*holds other samples"):
        ranks(2, _other, tmp_path)


def _other(folder):
    return draw(folder, seed=9)


def test_settings_reach_the_prior(tmp_path):
    rule = Rule()
    asked = request(temperature=0.9, top_k=7, top_p=0.8, schedule="cosine", cached=False, num_images=6)
    sample(rule, small(), tmp_path, Mesh(), asked)
    expected = AutoregressiveSampleConfig(1.5, "cosine", 0.9, 7, 0.8, cached=False)
    assert rule.asked == [([0, 1, 2, 3], 3, expected), ([4, 5], 3, expected)]


def test_what_does_not_go_together_is_refused():
    tokenizer = small()
    check(Rule(tokenizer.fingerprint), tokenizer, request())
    with pytest.raises(ValueError, match=f"fingerprint abc, and the one given has {tokenizer.fingerprint}"):
        check(Rule("abc"), tokenizer, request())
    more = Rule()
    more.num_codes = 14
    with pytest.raises(ValueError, match="the prior has 14 codes and the tokenizer 13"):
        check(more, tokenizer, request())
    with pytest.raises(ValueError, match=r"class 5, 9 is none of the prior's \(0 .. 4\): change --classes"):
        check(Rule(), tokenizer, request(classes=(5, 1, 9)))
    with pytest.raises(ValueError, match="list of classes is empty"):
        check(Rule(), tokenizer, request(classes=()))
    bad = {"num_images": 0, "batch": 0, "top_k": -1, "temperature": -1, "top_p": 0, "guidance": -1}
    said = request(classes=(1, 1), **bad).problems()
    assert any(re.match("class 1 .*twice", line) for line in said)
    for name, value in bad.items():
        assert any(line.startswith(f"{name} is {value}: use") for line in said)
    for wrong in (request(num_images=0), request(top_k=-1)):
        with pytest.raises(ValueError, match=r"is (0|-1): use at least"):
            check(Rule(), tokenizer, wrong)
    with pytest.raises(ValueError, match="settings are GuidedSampleConfig, and the prior autoregressive is sampled as"):
        check(Rule(), tokenizer, replace(request(), how=GuidedSampleConfig()))


def test_classes_are_numbers_and_ranges():
    assert parse_classes("0,5, 10-12") == (0, 5, 10, 11, 12)
    for text, why in ((",", "names no class"), ("5-3", "'5-3'"), ("cat", "'cat'"), ("-1", "'-1'")):
        with pytest.raises(ValueError, match=why):
            parse_classes(text)


def test_samples_that_were_begun_before_priors_had_their_own_settings_go_on(whole, tmp_path):
    """What sample.json said then: all settings in one dict, and no name of the prior."""
    draw(tmp_path, before=partial(at, MAKE, 3, 0, lambda: (tmp_path / "STOP").touch()))
    facts = json.loads((tmp_path / "sample.json").read_text())
    del facts["prior"]["name"]
    facts["settings"] = {"num_images": 23, "classes": [1, 4, 0], "guidance": 1.5, "schedule": "constant"}
    facts["settings"] |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 3, "batch": 4, "resize": None}
    facts["settings"] |= {"cached": True}
    (tmp_path / "sample.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=r'settings.precision is "bf16", and was "fp32"'):
        draw(tmp_path, precision="bf16")
    assert draw(tmp_path).images == 23 - 3 * 4
    assert (tmp_path / "samples.npz").read_bytes() == (whole / "samples.npz").read_bytes()


def test_a_setting_that_is_younger_than_the_samples_is_what_it_was_before(tmp_path, monkeypatch):
    """Drawing had one arithmetic before there was `packed`, and samples of then go on with it."""
    asked, ids = [], Rule.sample
    monkeypatch.setattr(Rule, "sample", lambda self, c, how, **rest: asked.append(how) or ids(self, c, how, **rest))
    draw(tmp_path, before=partial(at, MAKE, 3, 0, lambda: (tmp_path / "STOP").touch()))
    facts = json.loads((tmp_path / "sample.json").read_text())
    assert facts["settings"].pop("packed") is True
    (tmp_path / "sample.json").write_text(json.dumps(facts))
    begun = len(asked)
    assert draw(tmp_path).state == "sampled"
    assert {how.packed for how in asked[:begun]} == {True}
    assert {how.packed for how in asked[begun:]} == {False}
    assert json.loads((tmp_path / "sample.json").read_text())["settings"]["packed"] is False
    assert draw(tmp_path).state == draw(tmp_path, packed=False).state == "already"
