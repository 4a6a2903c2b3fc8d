"""Claims: what rules make of numbers, what is refused before anything runs, and a file from nothing to its page."""

from __future__ import annotations

import csv
import html
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from jobs import ROOT, write_config, write_shards

from vqscale import config as configuration
from vqscale import signals
from vqscale.config.schema import classes_of
from vqscale.parallel.mesh import Mesh
from vqscale.programs.claims import claims
from vqscale.programs.claims import rules as claim_rules
from vqscale.programs.claims.config import ClaimConfig, ClaimsConfig, Measured, NotHereConfig, RuleConfig
from vqscale.programs.claims.findings import HOLDS, IN_PART, NOT_HERE, UNDECIDED, UNTESTED, interval, judged
from vqscale.programs.commands import claims as command
from vqscale.programs.studies import study as studies
from vqscale.programs.studies.report import Line
from vqscale.show import study_page
from vqscale.signals.config import SignalConfig

DIALS = ["quantizer", "K"]
T = {2: 12.706, 3: 4.303}  # of Student's t at 95 %, by seeds, from a table


def _line(quantizer="ibq", k=16, seed=0, status="done", **numbers) -> Line:
    labels = {"quantizer": quantizer, "K": str(k), "seed": str(seed)}
    return {"run": f"{quantizer}-{k}-seed{seed}", **labels, "status": status, **numbers}


def _lines(**psnr) -> list[Line]:
    """Of ibq_16=[21.0, 21.1] two runs of these PSNR."""
    return [
        _line(*key.split("_"), seed, psnr=value) for key, values in psnr.items() for seed, value in enumerate(values)
    ]


def _judge(lines, *rules):
    data = {"name": "a", "paper": "p", "title": "t", "says": "s", "measure": "m", "rules": list(rules)}
    return claim_rules.judge(configuration.parse(ClaimConfig, data), lines, DIALS)


ABOVE = {"name": "above", "measure": "psnr", "of": ["quantizer=ibq"], "than": ["quantizer=vq"]}


@pytest.mark.parametrize(
    ("ibq", "vq", "margin", "verdict"),
    [
        ([22.0, 22.1, 22.2], [21.0, 21.1, 21.1], 0.5, HOLDS),
        ([22.0, 21.2, 22.2], [21.0, 21.1, 21.1], 0.5, UNDECIDED),
        ([21.4, 21.1, 22.0], [21.0, 21.1, 21.1], 0.5, UNDECIDED),
        ([21.2, 21.2, 21.2], [21.0, 21.1, 21.1], 0.5, NOT_HERE),
        ([22.0, 22.1], [21.0, 21.1], 0.5, HOLDS),
        ([22.0, 22.2], [21.0, 21.1], 0.5, UNDECIDED),
        ([22.0], [21.0], 0.5, UNDECIDED),
        ([21.4], [21.0], 0.5, UNDECIDED),
        ([21.0, 21.0], [21.0, 21.0], 0.0, NOT_HERE),
        ([21.0, math.nan], [21.0, 21.0], 0.0, UNTESTED),
    ],
)
def test_one_set_of_runs_beside_another(ibq, vq, margin, verdict):
    found, why, (finding,) = _judge(_lines(ibq_16=ibq, vq_16=vq), ABOVE | {"margin": margin})
    assert finding.verdict == verdict
    assert found == (UNTESTED if verdict == UNDECIDED else verdict)
    if verdict == UNTESTED:
        assert why == "the run ibq-16-seed1 has no psnr"
        return
    differences = [a - b for a, b in zip(ibq, vq, strict=True)]
    mean, n = sum(differences) / len(ibq), len(ibq)
    assert finding.difference == pytest.approx(mean)
    assert (finding.ours, finding.others) == pytest.approx((sum(ibq) / n, sum(vq) / n))
    if n == 1:
        assert (finding.low, finding.high) == (None, None)
        would = f"by their means {int(mean > margin)} of 1 comparisons would hold"
        assert why == f"not decided: one seed, and so no interval; {would}"
        return
    spread = math.sqrt(sum((each - mean) ** 2 for each in differences) / (n - 1))
    reach = T[n] * spread / math.sqrt(n)
    assert (finding.low, finding.high) == pytest.approx((mean - reach, mean + reach), abs=1e-3)


def test_what_is_turned_round_gets_the_opposite_verdict():
    """By how far a number is from the level nothing is easier to affirm than to deny."""
    opposite = {HOLDS: NOT_HERE, NOT_HERE: HOLDS, UNDECIDED: UNDECIDED}
    seen = set()
    for values in (
        [1.0],
        [-1.0],
        [1.0, 1.1],
        [-1.0, -1.1],
        [1.0, -0.9],
        [-1.0, 0.9],
        [0.2, 0.3, 0.1],
        [0.1, -0.2, 0.0],
    ):
        seeds = [str(number) for number, _ in enumerate(values)]
        above, below = (judged("a number", seeds, values, 0.05, sign=sign, strict=True) for sign in (1, -1))
        assert below.verdict == opposite[above.verdict]
        assert below.beyond != above.beyond
        seen.add(above.verdict)
    assert seen == set(opposite)


@pytest.mark.parametrize(
    ("at_16", "at_32", "at_64", "verdict", "why"),
    [
        (1.0, 1.0, None, IN_PART, "2 of 3 holds, 1 of 3 not decided (the level is within the interval)"),
        (
            -1.0,
            -1.0,
            None,
            NOT_HERE,
            "2 of 3 does not hold here, 1 of 3 not decided (the level is within the interval)",
        ),
        (1.0, -1.0, 1.0, IN_PART, "2 of 3 holds, 1 of 3 does not hold here"),
        (-1.0, -1.0, 1.0, IN_PART, "1 of 3 holds, 2 of 3 does not hold here"),
        (None, None, None, UNTESTED, "not decided: the level is within the interval"),
    ],
)
def test_a_verdict_for_or_against_a_claim_rests_on_a_comparison_that_is_decided(at_16, at_32, at_64, verdict, why):
    lines = _lines(vq_16=[20.0, 20.0], vq_32=[20.0, 20.0], vq_64=[20.0, 20.0])
    for k, better in ((16, at_16), (32, at_32), (64, at_64)):
        values = [18.0, 23.0] if better is None else [20.0 + better, 20.0 + 1.01 * better]
        lines += [_line("ibq", k, seed, psnr=value) for seed, value in enumerate(values)]
    found, said, _ = _judge(lines, ABOVE)
    assert found == verdict
    assert why in said


def test_the_interval_of_one_value_is_none():
    assert interval([1.0]) is None
    assert interval([1.0, 1.0]) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("rule", "verdict"),
    [
        ({"name": "at_least", "level": 21.0}, HOLDS),
        ({"name": "at_least", "level": 21.25}, UNDECIDED),
        ({"name": "at_least", "level": 21.4}, NOT_HERE),
        ({"name": "at_most", "level": 21.8}, HOLDS),
        ({"name": "at_most", "level": 21.3}, UNDECIDED),
        ({"name": "at_most", "level": 21.0}, NOT_HERE),
    ],
)
def test_a_level(rule, verdict):
    lines = _lines(ibq_16=[21.25, 21.3, 21.3], vq_16=[3.0])
    _, _, (finding,) = _judge(lines, {"measure": "psnr", "of": ["quantizer=ibq"], **rule})
    assert finding.verdict == verdict


@pytest.mark.parametrize(
    ("rule", "verdict"),
    [
        ({"better": "higher", "margin": 0.5}, HOLDS),
        ({"better": "higher", "margin": 0.1}, NOT_HERE),
        ({"better": "lower", "margin": 0.0}, HOLDS),
        ({"better": "higher", "margin": 0.02, "relative": True}, HOLDS),
        ({"better": "higher", "margin": 0.005, "relative": True}, NOT_HERE),
    ],
)
def test_no_worse_than_others(rule, verdict):
    lines = _lines(ibq_16=[20.8, 20.8, 20.81], vq_16=[21.0, 21.0, 21.0])
    assert _judge(lines, ABOVE | {"name": "no_worse_than"} | rule)[0] == verdict


def test_dials_that_are_left_open_are_compared_one_by_one():
    lines = _lines(ibq_16=[22.0, 22.0], vq_16=[21.0, 21.0], ibq_32=[22.0, 22.0], vq_32=[23.0, 23.0], ibq_64=[9.0])
    verdict, why, findings = _judge(lines, ABOVE)
    assert (verdict, why) == (IN_PART, "of the comparisons 1 of 2 holds, 1 of 2 does not hold here")
    assert [(each.where, each.verdict) for each in findings] == [("K 16", HOLDS), ("K 32", NOT_HERE)]
    one = ABOVE | {"of": ["quantizer=ibq", "K=16"], "than": ["quantizer=vq", "K=16"]}
    assert _judge(lines, one)[0] == HOLDS
    both = ABOVE | {"of": ["quantizer=ibq", "K=32", "K=16"], "than": ["quantizer=vq", "K=16", "K=32"]}
    assert [each.where for each in _judge(lines, both)[2]] == ["K 16", "K 32"]


def test_another_number_of_the_same_runs():
    lines = [_line(seed=seed, psnr_near=20.0 + seed, psnr_any=15.0 + seed) for seed in (0, 1, 2)]
    rule = {"name": "above", "measure": "psnr_near", "than_measure": "psnr_any", "margin": 4}
    assert _judge(lines, rule)[0] == HOLDS
    assert _judge(lines, rule | {"margin": 6})[0] == NOT_HERE


RISES = {"name": "rises", "measure": "psnr", "of": ["quantizer=ibq"], "over": "K"}
FALLS = RISES | {"name": "falls_after_peak"}


@pytest.mark.parametrize(
    ("rule", "means", "verdict"),
    [
        (RISES, (20, 21, 22), HOLDS),
        (RISES, (20, 21, 21), IN_PART),
        (RISES, (22, 21, 20), NOT_HERE),
        (RISES | {"better": "lower"}, (22, 21, 20), HOLDS),
        (FALLS, (20, 22, 21), HOLDS),
        (FALLS, (22, 21, 20), HOLDS),
        (FALLS | {"margin": 2}, (20, 22, 21), NOT_HERE),
        (FALLS, (20, 21, 22), NOT_HERE),
        (FALLS | {"better": "lower"}, (21, 20, 22), HOLDS),
    ],
)
def test_along_a_dial(rule, means, verdict):
    four, sixteen, large = ([mean, mean + 0.01] for mean in means)
    lines = _lines(ibq_16=sixteen, ibq_256=large, ibq_4=four, vq_4=[1.0])  # by their numbers, not as they come
    assert _judge(lines, rule)[0] == verdict


def test_seeds_that_only_one_side_has_are_left_out():
    lines = _lines(ibq_4=[20.0, 20.1, 20.2], ibq_16=[21.0])
    (finding,) = _judge(lines, RISES)[2]
    assert (finding.seeds, finding.verdict) == (("0",), UNDECIDED)


CURVE = {"name": "above_curve", "measure": "psnr", "over": "bits", "of": ["quantizer=scq"]}


@pytest.mark.parametrize(
    ("bits", "psnr", "verdict", "why"),
    [
        (15.0, 25.1, HOLDS, ""),
        (15.0, 24.9, NOT_HERE, ""),
        (10.0, 20.1, HOLDS, ""),
        (20.5, 40.0, UNTESTED, "bits is 20.5, and that of the others from 10 to 20"),
    ],
)
def test_at_equal_bits(bits, psnr, verdict, why):
    points = [
        _line(f"rvq{number}", seed=seed, bits=number, psnr=10.0 + number) for number in (10, 20) for seed in (0, 1)
    ]
    rule = CURVE | {"curve": ["quantizer=rvq10", "quantizer=rvq20"]}
    lines = [*points, *(_line("scq", seed=seed, bits=bits, psnr=psnr) for seed in (0, 1))]
    assert _judge(lines, rule)[:2] == (verdict, why)


def test_a_curve_has_the_labels_of_the_dials_that_are_left_open():
    """Of K = 16 the curve is of K = 16."""
    points = [_line(f"rvq{n}", k, bits=n, psnr=n + k) for n in (10, 20) for k in (16, 32)]
    rule = CURVE | {"curve": ["quantizer=rvq10", "quantizer=rvq20"]}
    (small, large) = _judge([*points, *(_line("scq", k, bits=15, psnr=40.0) for k in (16, 32))], rule)[2]
    assert (small.where, small.others) == ("K 16", 31.0)
    assert (large.where, large.others) == ("K 32", 47.0)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (_line("vq", status="failed", error="no room"), "the run vq-16-seed0 is failed: no room"),
        (_line("vq", status="waiting"), "the run vq-16-seed0 is waiting"),
        (_line("vq", psnr=None), "the run vq-16-seed0 has no psnr"),
        (_line("lfq", psnr=21.0), "this form of the study has no such runs"),
    ],
)
@pytest.mark.parametrize("rule", [ABOVE, ABOVE | {"name": "no_worse_than"}, CURVE | {"curve": ["quantizer=vq"]}])
def test_what_is_missing_or_has_failed_is_not_tested(line, why, rule):
    rule = rule | {"of": ["quantizer=ibq"]}
    verdict, said, _ = _judge([_line(psnr=22.0, bits=1.0), line | {"bits": 1.0}], rule)
    assert (verdict, said) == (UNTESTED, why)


def test_what_cannot_be_tested_says_why():
    assert _judge([], {"name": "not_here", "why": "it takes a GPU"})[:2] == (UNTESTED, "it takes a GPU")


def test_every_form_of_rules_is_computed():
    forms = {each for each in classes_of(RuleConfig) if each is not NotHereConfig}
    assert forms == set(claim_rules.FORMS)
    assert all(issubclass(form, Measured) for form in forms)


# Files


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("claims")
    return write_config(folder, write_shards(folder / "shards"))


K = {"name": "K", "key": "tokenizer.quantizer.num_codes", "values": [16, 32]}
MORE = {"name": "more-codes", "paper": "ours", "title": "more codes are better", "says": "20 dB", "measure": "PSNR"}
RULE = {"name": "rises", "measure": "psnr", "over": "K"}


def _write(base: Path, claim=(), **keys) -> Path:
    study = {"base": base.name, "dials": [K], "seeds": [0, 1], "jobs": 2, "folder": str(base.parent / "study")}
    study |= keys.pop("study", {})
    data = {"claims": [MORE | {"rules": [RULE]} | dict(claim)], "study": study, "minutes": 3, "quick_minutes": 1} | keys
    path = base.parent / "tiny.yaml"
    path.write_text(json.dumps(data))  # JSON is YAML
    return path


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"claim": {"rules": [RULE | {"name": "roughly"}]}}, ["expected", "above", "found the text 'roughly'"]),
        ({"claim": {"rules": [RULE | {"measure": "psrn"}]}}, ["measures psrn, which is no column", "psnr"]),
        ({"claim": {"rules": [RULE | {"measure": "rmse"}]}}, ["measures rmse, which is no column"]),
        ({"claim": {"rules": [RULE | {"measure": "psnr_near_0.1"}]}}, ["measures psnr_near_0.1, which is no column"]),
        ({"claim": {"rules": [RULE | {"of": ["K=64"]}]}}, ["has K=64, and the positions of K are 16, 32"]),
        ({"claim": {"rules": [RULE | {"of": ["codes=16"]}]}}, ["has the dial codes, and the study has K"]),
        ({"claim": {"rules": [RULE | {"over": "seed"}]}}, ["goes over seed, which is no dial of numbers"]),
        ({"claim": {"rules": [RULE | {"over": ""}]}}, ["goes over no dial"]),
        ({"claim": {"rules": []}}, ["more-codes has no rule"]),
        ({"claim": {"rules": [{"name": "not_here"}]}}, ["says why"]),
        ({"claim": {"name": "More codes"}}, ["'More codes' is no word of a command line"]),
        ({"claim": {"rules": [ABOVE | {"of": ["K=16"], "than": []}]}}, ["of and than fix the dials K and none"]),
        (
            {"claim": {"rules": [ABOVE | {"of": ["K=16", "K=32"], "than": ["K=32"]}]}},
            ["of is open among K=16, K=32, and than among nothing"],
        ),
        ({"claim": {"rules": [ABOVE | {"of": [], "than": []}]}}, ["the same runs and the same number"]),
        ({"claim": {"rules": [ABOVE | {"of": ["K=16"], "than": ["K=32"], "margin": -1}]}}, ["margin is -1"]),
        ({"claims": []}, ["the file has no claim"]),
        ({"claims": [MORE | {"rules": [RULE]}] * 2}, ["2 claims are called more-codes"]),
        ({"before": [["bash", "-c", "true"]]}, ["bash is no program that may come before: use train"]),
        ({"before": [["train"]]}, ["before", "train is given no CONFIG"]),
        ({"before": [["train", "nowhere.yaml"]]}, ["nowhere.yaml: there is no such file"]),
        ({"quick": {"dials": [{"name": "L", "key": "a", "values": [1]}]}}, ["quick.dials", "the study's are K"]),
    ],
)  # fmt: skip
def test_what_a_file_may_not_say(base, tmp_path, capsys, keys, words):
    path = _write(base, **keys)
    assert command.main([str(path), "--out", str(tmp_path / "page")]) == 2
    said = capsys.readouterr().err
    for word in words:
        assert word in said
    assert not (base.parent / "study").exists()
    assert not (tmp_path / "page").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--only", "nothing"], "no file and no claim is called so, they are more-codes, tiny"),
        (["--slurm", "--list"], "--slurm starts studies"),
        (["nowhere.yaml"], "there is no such file"),
        (["study.job=3"], "study.jobs"),
    ],
)
def test_words_that_do_not_go_together(base, capsys, given, said):
    assert command.main([str(_write(base)), *given]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--nonsense"], ["--time=02:00:00"], ["--slurm", "-x"]])
def test_options_that_nothing_takes(base, given):
    with pytest.raises(SystemExit) as left:
        command.main([str(_write(base)), *given])
    assert left.value.code == 2


def test_a_list_starts_nothing(base, capsys):
    assert command.main([str(_write(base)), "--list"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "tiny: 3 minutes, estimated; 4 of 4 runs left", "  more-codes: ours: more codes are better", "3 minutes in all"
    ]  # fmt: skip
    assert not (base.parent / "study").exists()


def test_quick_is_a_form_of_its_own(base):
    path = _write(base, quick={"set": ["run.steps=2"], "seeds": [5]}, study={"parts": [{"seeds": [7]}]})
    full, quick = claims.load(path), claims.load(path, quick=True)
    assert sorted(trial.name for trial in full.trials) == [f"{k}-seed{seed}" for k in (16, 32) for seed in (0, 1, 7)]
    assert [trial.name for trial in quick.trials] == ["16-seed5", "32-seed5"]
    assert {trial.config.run.steps for trial in quick.trials} == {2}
    assert quick.study.folder == f"{full.study.folder}-quick"
    assert (quick.minutes, full.minutes) == (1, 3)


def test_a_file_that_is_yours_to_bring_is_asked_for_and_nothing_runs(base, tmp_path, capsys):
    path = _write(base, needs=[str(tmp_path / "cifar.tar.gz")])
    assert command.main([str(path), "--out", str(tmp_path / "page")]) == 0
    said = "cifar.tar.gz is yours to bring, and is not here"
    assert f"more-codes: {UNTESTED} ({tmp_path}/{said})" in capsys.readouterr().out
    assert not (base.parent / "study").exists()


UNDECIDED_HERE = f"{UNTESTED} (not decided: one seed, and so no interval; by their means "
SHORT = [f"run.{key}=2" for key in ("steps", "eval_every", "checkpoint_every")]
HOSTILE = "<script>alert('$x^$')</script> & \"more\" $\\frac{$"


def _results(page: Path) -> list[dict[str, str]]:
    with (page / "claims.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_from_nothing_to_the_page(base, tmp_path, capsys):
    cannot = MORE | {"name": "speed", "rules": [{"name": "not_here", "why": "it takes a GPU"}]}
    dies = MORE | {"name": "dies", "rules": [RULE | {"name": "at_least", "of": ["K=64"], "measure": "usage"}]}
    few = MORE | {"name": "few", "title": HOSTILE, "rules": [RULE | {"name": "at_most", "level": 99.0, "of": ["K=16"]}]}
    for each in (dies, few):
        del each["rules"][0]["over"]
    claimed = [MORE | {"rules": [RULE | {"of": ["K=16", "K=32"]}]}, cannot, few, dies]
    shards = str(tmp_path / "made")
    before = [["shards", "--source", "shapes", "--num", "4", "--size", "8", "--out", shards]]
    study = {"parts": [{"set": ["run.device=cuda"], "seeds": [9], "dials": [K | {"values": [64]}]}]}
    study |= {"folder": str(tmp_path / "study"), "seeds": [0], "jobs": 3, "set": SHORT}
    path, page = _write(base, claims=claimed, before=before, study=study), tmp_path / "page"
    assert command.main([str(path), "--out", str(page)]) == 1  # one run has failed
    said = capsys.readouterr().out
    assert f"page: {page / 'index.html'}" in said
    assert (Path(shards) / "train-0000.tar").exists()
    found = {line["name"]: line for line in _results(page)}
    assert found["speed"]["verdict"] == f"{UNTESTED} (it takes a GPU)"
    assert found["dies"]["verdict"].startswith(f"{UNTESTED} (the run 64-seed9 is failed: ")
    assert found["few"]["verdict"] == f"{UNDECIDED_HERE}1 of 1 comparisons would hold)"
    assert found["more-codes"]["verdict"].startswith(UNDECIDED_HERE)

    kept = json.loads((page / "claims.json").read_text())
    (finding,) = kept["claims"][0]["findings"]
    runs = {}
    for run in (tmp_path / "study" / "runs").iterdir():
        if (run / "summary.json").exists():
            runs[run.name] = json.loads((run / "summary.json").read_text())
    assert finding["judged"] == pytest.approx(runs["32-seed0"]["psnr"] - runs["16-seed0"]["psnr"])
    assert kept["form"] == "full"
    assert sum(kept["verdicts"].values()) == 4
    assert json.loads((page / "tiny" / "study.json").read_text())["runs"] == {"done": 2, "failed": 1}
    assert (page / "tiny" / "results.csv").exists()

    text = (page / "index.html").read_text()
    assert "<script>alert" not in text
    assert html.escape(HOSTILE) in text
    assert "http://" not in text
    assert "https://" not in text
    assert text.count("data:image/png;base64,") == 2  # speed and dies have no numbers
    assert f"{path} --only more-codes" in text
    assert "20 dB" in text
    # again: what is done stays as it is, but for the run that has failed
    stamps = [path.stat().st_mtime_ns for path in (tmp_path / "study" / "runs").glob("*/summary.json")]
    made = (Path(shards) / "train-0000.tar").stat().st_mtime_ns
    assert command.main([str(path), "--only", "speed", "--out", str(page)]) == 1
    assert [path.stat().st_mtime_ns for path in (tmp_path / "study" / "runs").glob("*/summary.json")] == stamps
    assert (Path(shards) / "train-0000.tar").stat().st_mtime_ns == made
    # and a report of it, elsewhere
    assert command.main([str(path), "--report", "--out", str(tmp_path / "other")]) == 0
    assert _results(tmp_path / "other") == _results(page)
    # where the runs are gone, it is of the results that are kept there, and of no others
    (tmp_path / "study").rename(tmp_path / "gone")
    shutil.rmtree(shards)
    assert command.main([str(path), "--report", "--out", str(page)]) == 0
    now = {line["name"]: line for line in _results(page)}
    assert {name: now[name] for name in ("few", "speed")} == {name: found[name] for name in ("few", "speed")}
    assert now["more-codes"]["measured here"] == found["more-codes"]["measured here"]
    assert now["dies"]["verdict"] == f"{UNTESTED} (the run 64-seed9 is waiting)"
    assert f"**{UNTESTED}**: not decided: " in (page / "claims.md").read_text()
    others = f"study.set={json.dumps([*SHORT, 'data.batch=2'])}"
    assert command.main([str(path), "--report", "--out", str(page), others]) == 2
    assert "has results of another form of this study, which differs in set: take another" in capsys.readouterr().err


@pytest.mark.slow
def test_a_command_before_that_fails_is_the_reason(base, tmp_path, capsys):
    before = [["cluster", str(tmp_path / "nothing"), "--clusters", "4"]]
    path, page = _write(base, before=before, study={"folder": str(tmp_path / "study")}), tmp_path / "page"
    assert command.main([str(path), "--out", str(page)]) == 1
    (line,) = _results(page)
    assert line["verdict"].startswith(f"{UNTESTED} (vqscale cluster {tmp_path}/nothing --clusters 4 failed: ")
    assert not (tmp_path / "study" / "runs").exists()
    # the study can be judged when the command has come to its end
    capsys.readouterr()
    ended = json.loads((tmp_path / "study" / "before.json").read_text())
    (tmp_path / "study" / "before.json").write_text(json.dumps(dict.fromkeys(ended, "")))
    command.main([str(path), "--report", "--out", str(page)])
    assert "is waiting" in capsys.readouterr().out


@pytest.mark.slow
def test_interrupted_and_continued(base, tmp_path):
    num = 240  # steps, of which both are asked to stop after the first few
    more = [f"run.steps={num}", f"run.checkpoint_every={num}", f"run.eval_every={num}"]
    path = _write(base, study={"folder": str(tmp_path / "study"), "set": more, "seeds": [0]})
    words = [sys.executable, str(ROOT / "tools" / "claims.py"), str(path), "--out", str(tmp_path / "page")]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a suite in the background ignores it
    )  # fmt: skip
    asked = claims.load(path)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not all(studies.last_row(trial.folder) for trial in asked.trials):
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 75, said
    assert "the same command goes on" in said
    assert f"more-codes: {UNTESTED} (" in said, said  # a run is waiting, or both had just ended, with one seed
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for trial in asked.trials:
        rows = [json.loads(line) for line in (trial.folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if "loss" in row] == list(range(1, num + 1))
    assert _results(tmp_path / "page")[0]["verdict"].startswith(UNDECIDED_HERE)


def test_the_numbers_of_signals_are_those_of_their_metrics():
    config = {"depth": {}, "color": {}, "images": {}, "sounds": {"sample_rate": 16000, "num_mels": 8}}
    config["panoptic"] = {"num_things": 2, "num_stuff": 2, "num_instances": 4}
    for name, settings in config.items():
        made = signals.build(configuration.parse(SignalConfig, {"name": name, **settings}))
        found = set(made.sums(Mesh(), None).numbers())
        assert set(claims.OF_SIGNALS[name]) <= found, name
        assert found - {*claims.OF_SIGNALS[name]} <= {"images", "without_depth", "beyond_instances"}, name
    assert set(claims.OF_SIGNALS) == set(signals.SIGNALS)


def test_columns_that_a_study_has_are_those_that_a_rule_may_name(base):
    columns = claims.measures(*(lambda asked: (asked.study, asked.trials))(claims.load(_write(base))))
    assert {"psnr", "usage", "usage_of_ceiling", "bits", "process_s"} <= set(columns)
    assert "shapes_distance" not in columns
    line = study_page.result(study_page.TASKS["tokenizer"], {"usage": 0.5, "ceiling": 0.8, "psnr": 20.0}, {})
    assert line["usage_of_ceiling"] == 0.625
    assert configuration.parse(ClaimsConfig, json.loads(_write(base).read_text())).claims[0].name == "more-codes"
