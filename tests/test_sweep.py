"""Sweeps of sampling settings: each measured once, the whole table kept, on one and two processes."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import signal
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import pytest
import torch
from jobs import contents, hear
from saved_runs import small
from slow_metrics import Small
from test_sample import MAKE, Rule, at

from vqscale.metrics import generation
from vqscale.metrics.sample_file import SampleFile
from vqscale.parallel.mesh import Mesh
from vqscale.priors.config import SampleConfig
from vqscale.priors.config.autoregressive import AutoregressiveSampleConfig
from vqscale.programs.sampling import sweep
from vqscale.programs.sampling.request import SampleRequest, combinations
from vqscale.run import folder as run_folder
from vqscale.show.sweep_table import Table, nearest, score

BASE = SampleRequest(num_images=12, classes=(0, 1, 2), how=AutoregressiveSampleConfig(), batch=4)
USUAL = AutoregressiveSampleConfig.dials()
DIALS = {"temperature": [0.9, 1.0], "guidance": [1.0, 1.5, 2.0]}


def references(folder):
    """Images that samples are compared with, made once."""
    path = folder / "reference.npz"
    if not path.exists():
        np.savez(path, np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    return path


def run(folder, dials=DIALS, before=None, **others):
    """(rows, number of batches that were drawn) of a sweep that nobody stopped."""
    rows, missing, batches = swept(folder, dials, before, **others)
    assert not missing
    return rows, batches


def swept(folder, dials=DIALS, before=None, tokenizer_seed=1, keep=False, reference=None, network=None, **base):
    """(rows, settings missing, number of batches that were drawn) of a sweep in this process, which may be one of
    several.
    """
    torch.set_num_threads(1)
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    mesh, rule = Mesh(world), Rule()
    scoring = sweep.Scoring(network or Small(), reference or references(folder))
    every = combinations(replace(BASE, **base), dials)
    tokenizer = small(mesh, tokenizer_seed)
    handlers = {name: signal.getsignal(name) for name in run_folder.STOP_SIGNALS}
    try:
        with pytest.MonkeyPatch.context() as changes:
            if before is not None:
                before(int(os.environ.get("RANK", "0")), changes)
            table, missing = sweep.sweep(
                rule, tokenizer, scoring, folder / "out", mesh, every, about={"command": "x"}, keep=keep
            )
    finally:
        for name, handler in handlers.items():
            signal.signal(name, handler)
    return table.rows, missing, len(rule.asked)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    rows, batches = run(folder, keep=True)
    assert batches == 6 * 3
    return folder, rows


def test_every_combination_has_the_scores_of_its_samples(whole):
    folder, rows = whole
    assert [(row["temperature"], row["guidance"]) for row in rows] == [(t, g) for t in (0.9, 1) for g in (1, 1.5, 2)]
    network = Small()
    reference = generation.read_reference(folder / "reference.npz", network, Mesh())
    for row in rows:
        place = folder / "out" / f"guidance{row['guidance']:g}{'-temperature0.9' if row['temperature'] < 1 else ''}"
        seen = generation.describe(SampleFile(place / "samples.npz"), network, Mesh())
        for key, value in generation.compare(seen, reference).items():
            assert row[key] == pytest.approx(value, rel=1e-9), key
    assert len({row["distance_other_inception"] for row in rows}) == 3  # the stand-in does not hear of temperature


def test_the_table_is_kept_whole(whole):
    folder, rows = whole
    table = json.loads((folder / "out" / "sweep.json").read_text())
    assert table["rows"] == [json.loads(json.dumps(row)) for row in rows]
    assert table["nearest"] == min(table["rows"], key=lambda row: row["distance_other_inception"])
    assert table["prior"]["fingerprint"] == "f00d"
    path = folder / "reference.npz"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert table["judge"]["reference"] == {"file": str(path), "sha256": digest}
    with (folder / "out" / "sweep.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [float(line["score_other_inception"]) for line in lines] == [row["score_other_inception"] for row in rows]
    assert (folder / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    told = Table(USUAL, rows).text().splitlines()
    assert told[0].split()[:3] == ["guidance", "temperature", "distance_other_inception"]
    assert len(told) == 7


@pytest.mark.slow
def test_what_is_measured_is_not_measured_again(whole, tmp_path):
    rows, batches = run(tmp_path, {"guidance": [1.0, 2.0]})
    assert batches == 6
    assert not list(tmp_path.rglob("samples.npz"))
    more, batches = run(tmp_path, {"guidance": [1.0, 1.5, 2.0]})
    assert batches == 3
    assert [more[0], more[2]] == rows
    with pytest.raises(
        ValueError, match=r"measured of something else, tokenizer.fingerprint is \w+, and was \w+: give"
    ):
        run(tmp_path, {"guidance": [1.0]}, tokenizer_seed=2)
    result = tmp_path / "out" / "guidance1" / "result.json"
    result.write_text("{")
    with pytest.raises(ValueError, match=r"result.json cannot be read .*: remove .*guidance1, and it is"):
        run(tmp_path, {"guidance": [1.0]})


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_fill_the_same_table(whole, tmp_path, ranks):
    references(tmp_path)
    for rows, _ in ranks(2, run, tmp_path, {"guidance": [1.0, 1.5]}):
        for mine, alone in zip(rows, [whole[1][3], whole[1][4]], strict=True):
            assert mine.keys() == alone.keys()
            for key, value in alone.items():
                assert mine[key] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-6)), key


def guided(folder):
    """The scales in the table of a folder, whose three files must agree."""
    table = json.loads((folder / "out" / "sweep.json").read_text())
    with (folder / "out" / "sweep.csv").open() as file:
        assert [float(line["guidance"]) for line in csv.DictReader(file)] == [row["guidance"] for row in table["rows"]]
    assert (folder / "out" / "sweep.png").read_bytes() == Table(USUAL, table["rows"]).chart()
    return [row["guidance"] for row in table["rows"]]


@pytest.mark.slow
def test_the_table_has_what_other_calls_measured(tmp_path):
    run(tmp_path, {"guidance": [1.0, 2.0]})
    rows, batches = run(tmp_path, {"guidance": [3.0, 1.5]})
    assert [row["guidance"] for row in rows] == guided(tmp_path) == [1, 1.5, 2, 3]
    assert batches == 6
    assert [row["guidance"] for row in run(tmp_path, {"guidance": [3.0]})[0]] == [1, 1.5, 2, 3]
    run(tmp_path, {"guidance": [0.5]}, seed=1)  # other images, which have no place beside these
    assert guided(tmp_path) == [0.5]
    swept(tmp_path, {"guidance": [4.0, 5.0]}, partial(at, SCORE, 1, 0, TERM))
    assert guided(tmp_path) == [1, 1.5, 2, 3, 4]


@pytest.mark.slow
def test_no_step_of_a_sweep_makes_the_table_smaller(tmp_path):
    run(tmp_path, {"guidance": [1.0, 2.0]})
    sizes = []
    look = partial(at, LOOK, 2, 0, lambda: sizes.append(guided(tmp_path)))  # the first is at the reference
    run(tmp_path, {"guidance": [0.5, 1.0]}, look)
    assert sizes == [[1, 2]]
    (tmp_path / "out" / "sweep.json").unlink()  # as when it was killed before
    run(tmp_path, {"guidance": [2.0]})
    assert guided(tmp_path) == [0.5, 1, 2]


TERM = partial(hear, signal.SIGTERM)
LOOK, SCORE = "vqscale.metrics.generation:describe", "vqscale.metrics.generation:compare"


class Blind(Small):
    """A network that looks at nothing."""

    def __call__(self, images):
        raise AssertionError("an image was looked at")


@pytest.mark.slow
def test_a_reference_is_known_by_its_content(tmp_path):
    rows, _ = run(tmp_path, {"guidance": [1.0]})
    other = tmp_path / "other.npz"
    other.write_bytes(references(tmp_path).read_bytes())
    network = Blind()
    network.facts = {**network.facts, "file": "renamed.pth"}
    assert run(tmp_path, {"guidance": [1.0]}, reference=other, network=network) == (rows, 0)
    assert json.loads((tmp_path / "out" / "sweep.json").read_text())["judge"]["reference"]["file"] == str(other)
    more, _ = run(tmp_path, {"guidance": [2.0]}, reference=other)
    assert more[0] == rows[0]
    assert len(more) == 2


def test_what_is_of_something_else_is_refused_before_anything_is_looked_at(tmp_path):
    run(tmp_path, {"guidance": [2.0]})
    np.savez(tmp_path / "other.npz", np.zeros((20, 8, 8, 3), np.uint8))
    before = contents(tmp_path)
    dials = {"guidance": [1.0, 2.0]}
    told = r"guidance2 was measured of something else, judge.reference.sha256 is \w{64}, and was \w{64}: give"
    with pytest.raises(ValueError, match=told):
        run(tmp_path, dials, reference=tmp_path / "other.npz", network=Blind())
    with pytest.raises(
        ValueError, match=r"else, judge.inception.sha256 is 0+6, and was 0+5; settings.num_images is 11"
    ):
        run(tmp_path, dials, network=Blind(seed=6), num_images=11)
    result = tmp_path / "out" / "guidance2" / "result.json"
    result.write_text(json.dumps({"row": {}, "facts": {"prior": 1}}))
    with pytest.raises(ValueError, match=r"result.json cannot be read .*: remove .*guidance2, and it is"):
        run(tmp_path, dials, network=Blind())
    after = contents(tmp_path)
    assert {path for path in before if before[path] != after[path]} == {result}
    assert before.keys() == after.keys()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "number", "measured", "drawn"),
    [(MAKE, 1, 0, 1), (MAKE, 3, 0, 3), (SCORE, 1, 1, 3), (MAKE, 9, 2, 9)],
    ids=["first batch", "last batch", "scoring", "very last batch"],
)
def test_a_signal_is_heard_wherever_it_comes(tmp_path, where, number, measured, drawn):
    dials = {"guidance": [1.0, 1.5, 2.0]}
    rows, missing, batches = swept(tmp_path, dials, partial(at, where, number, 0, TERM))
    assert (len(rows), missing, batches) == (measured, 3 - measured, drawn)
    rows, batches = run(tmp_path, dials)
    assert (len(rows), batches) == (3, 9 - drawn)


def test_a_signal_after_all_is_measured_stops_nothing(tmp_path):
    rows, batches = run(tmp_path, {"guidance": [1.0]}, partial(at, SCORE, 1, 0, TERM))
    assert (len(rows), batches) == (1, 3)


def test_a_file_stop_is_heard_and_removed(tmp_path):
    out = tmp_path / "out"
    make = partial(at, MAKE, 2, 0, (out / "STOP").touch)
    assert swept(tmp_path, {"guidance": [1.0]}, make) == ([], 1, 2)
    assert not (out / "STOP").exists()
    assert run(tmp_path, {"guidance": [1.0]})[1] == 1


@pytest.mark.slow
@pytest.mark.dist
def test_one_rank_of_two_is_asked_to_stop_while_it_measures(tmp_path, ranks):
    references(tmp_path)
    dials = {"guidance": [1.0, 1.5]}
    answers = ranks(2, swept, tmp_path, dials, partial(at, LOOK, 2, 1, TERM))
    assert [(len(rows), missing) for rows, missing, _ in answers] == [(1, 1)] * 2
    assert [len(rows) for rows, _ in ranks(2, run, tmp_path, dials)] == [2, 2]


def test_requests_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match=r"temperature is -1.0: use 0 .*; top_p is 0.0"):
        combinations(BASE, {"temperature": [-1.0, 1.0], "top_p": [0.0]})
    assert len(combinations(BASE, {"guidance": [1.0, 1.0, 2.0]})) == 2


def test_every_setting_has_a_folder_of_its_own():
    every = combinations(BASE, {"top_k": [0, 5], "top_p": [1.0, 0.9], "schedule": ["constant", "linear"], **DIALS})
    names = {sweep.name(one.how) for one in every}
    assert len(names) == 48
    assert "guidance1" in names
    assert "guidance1.5-schedule_linear-temperature0.9-top_k5-top_p0.9" in names
    near = [1.0, 1.0 + 1e-9]
    assert len({sweep.name(one.how) for one in combinations(BASE, {"guidance": near, "temperature": near})}) == 4
    assert sweep.name(SampleConfig()) == "usual"


def test_what_was_measured_before_folders_had_these_names_is_in_the_table(tmp_path):
    rows, _ = run(tmp_path, {"guidance": [1.5]})
    old = tmp_path / "out" / "guidance1.5-temperature1"
    (tmp_path / "out" / "guidance1.5").rename(old)
    assert run(tmp_path, {"guidance": [1.5]}) == (rows, 0)
    with pytest.raises(
        ValueError, match=r"guidance1.5-temperature1 was measured of something else, settings.seed is 1"
    ):
        run(tmp_path, {"guidance": [1.5]}, seed=1)


@pytest.mark.slow
def test_what_was_measured_before_there_was_a_dial_had_its_default(tmp_path):
    rows, _ = run(tmp_path, {"guidance": [1.0]})
    path = tmp_path / "out" / "guidance1" / "result.json"
    result = json.loads(path.read_text())
    del result["row"]["top_k"], result["facts"]["settings"]["top_k"]
    path.write_text(json.dumps(result))
    assert run(tmp_path, {"guidance": [1.0]}) == (rows, 0)
    assert [row["top_k"] for row in run(tmp_path, {"top_k": [0, 5]})[0]] == [0, 5]


@pytest.mark.slow
def test_a_sweep_that_is_older_than_a_setting_goes_on_as_it_began(tmp_path):
    rows, _ = run(tmp_path, {"guidance": [1.0]})
    path = tmp_path / "out" / "guidance1" / "result.json"
    result = json.loads(path.read_text())
    del result["facts"]["settings"]["packed"]
    path.write_text(json.dumps(result))
    assert run(tmp_path, {"guidance": [1.0]}) == (rows, 0)
    assert len(run(tmp_path, {"guidance": [1.0, 2.0]})[0]) == 2
    other = json.loads((tmp_path / "out" / "guidance2" / "result.json").read_text())
    assert other["facts"]["settings"]["packed"] is False


def test_curves_go_over_guidance_one_for_each_of_the_others():
    usual = asdict(AutoregressiveSampleConfig())
    rows = [{**usual, "guidance": g, "temperature": t, "fid": g * t} for g in (2.0, 1.0) for t in (0.9, 1.0)]
    x, lines = Table(USUAL, rows).curves("fid")
    assert (x, lines) == (
        "guidance",
        {"temperature 0.9": [(1.0, 0.9), (2.0, 1.8)], "temperature 1.0": [(1.0, 1.0), (2.0, 2.0)]},
    )
    assert Table(USUAL, [{**row, "guidance": 1.0} for row in rows]).curves("fid")[0] == "temperature"
    ramps = [{**usual, "schedule": ramp, "fid": 1.0} for ramp in ("constant", "linear")]
    assert Table(USUAL, ramps).curves("fid") == (
        "guidance",
        {f"schedule {r}": [(1.0, 1.0)] for r in ("constant", "linear")},
    )
    assert nearest(rows)["fid"] == 0.9
    assert nearest([usual]) is None
    assert score(rows, "fid") == "fid"
