"""tools/bench head: what it prints, that its forms compute the same, its bytes. No time is asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import forks
import pytest
import torch

from vqscale.parallel.mesh import Mesh

SMALL = ("--tokens", "64", "--drawn", "16", "--dim", "8", "--repeats", "2", "--threads", "1")
N, D, DRAWN = 64, 8, 16


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_from_the_command_line():
    done = forks.program("tools/bench", "head", *SMALL, "--processes", 2, "--codes", 99, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"head", "left_out", "machine", "commit", "command", "config"}
    assert set(report["head"]) == {"99"}
    vectors, number, ident = N * D * 4, N * 4, N * 8
    for codes, works in report["head"].items():
        assert {"ours", "bf16", "twice", "dense", "floor"} <= set(works["loss"])
        assert set(works["sample"]) == {"ours", "top-p", "dense"}
        for row in [*works["loss"].values(), *works["sample"].values()]:
            assert row["seconds"] > 0
            assert row["peak_bytes"] is None or row["peak_bytes"] >= 0
        assert works["loss"]["twice"]["sent_bytes"] == 2 * vectors + ident + 2 * 3 * number + number
        assert works["loss"]["ours"]["sent_bytes"] == works["loss"]["twice"]["sent_bytes"] + 4
        assert works["loss"]["dense"]["sent_bytes"] == int(codes) * D * 4
        assert works["loss"]["floor"]["sent_bytes"] == works["sample"]["dense"]["sent_bytes"] == 0
        assert works["sample"]["ours"]["sent_bytes"] == DRAWN * (D * 4 + 8 + 2 * (4 + 8))
    for note in report["left_out"]:
        assert note in done.stderr


def test_the_forms_compute_the_same(tool):
    forms = tool("head_forms")
    wanted = tuple(name for name in tool("setting").LOSSES if name not in forms.missing() and name != "cce")
    built = forms.build(forms.HeadSetting(40, 127, 8, drawn=5, losses=wanted), Mesh())
    expected = built["loss"]["dense"]()
    for name in wanted:
        if name == "floor":
            continue
        loose = 2e-2 if name == "bf16" else 1e-5
        for got, exact in zip(built["loss"][name](), expected, strict=True):
            assert (got - exact).norm() < loose * exact.norm(), name
    for form in built["sample"].values():
        (ids,) = form()
        assert ids.shape == (5,)
        assert ids.max() < 127


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="this kernel does not count peaks")
def test_peak_bytes_of_ours_are_not_tokens_times_codes(tool):
    forms, measure = tool("head_forms"), tool("measure")
    mesh, tokens, codes = Mesh(), 512, 16384
    pairs = tokens * codes * 4
    wanted = forms.HeadSetting(tokens, codes, 8, drawn=tokens, scan_mib=4, losses=("twice", "ours", "bf16", "dense"))
    built = forms.build(wanted, mesh)
    peaks = {name: measure.alone(form, mesh).peak_bytes for name, form in built["loss"].items()}
    assert peaks["twice"] < pairs / 2
    assert peaks["ours"] < pairs / 2  # whose exponentials would be more than it may keep
    assert peaks["bf16"] < pairs / 2
    # one more copy of them is a library's that lays out what it multiplies anew, as on some processors
    assert 2 * pairs < peaks["dense"] < forms.dense_memory(wanted) + 1.2 * pairs
    for name in ("ours", "top-p"):
        assert measure.alone(built["sample"][name], mesh).peak_bytes < pairs / 2


@pytest.mark.slow
def test_what_does_not_fit_or_is_not_there_is_left_out_and_said(tool, capsys, monkeypatch):
    head, forms = tool("head"), tool("head_forms")
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", None)
    # in this process: what is printed is tested, not how processes are started
    monkeypatch.setattr("vqscale.parallel.spawn.run", lambda function, _, *args, timeout_s: [function(*args)])
    assert head.main([*SMALL, "--codes", "128", "512", "--max-dense-gib", "0.0002"]) == 0
    out, err = capsys.readouterr()
    assert "cce is left out: cut-cross-entropy cannot be imported" in err
    assert "dense and cce are left out for 512 codes: they need about 0.4 MiB" in err
    rows = [line.split()[:3] for line in out.splitlines()]
    assert ["128", "loss", "dense"] in rows
    assert ["512", "loss", "dense"] not in rows
    assert ["512", "loss", "ours"] in rows
    assert ["512", "sample", "dense"] not in rows
    assert head.main([*SMALL, "--codes", "128", "--losses", "twice"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines() if " loss " in line] == ["twice", "floor"]
    assert forms.dense_bytes(forms.HeadSetting(1, 100, 10, processes=4)) == 2 * 3 * 4000 // 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--codes", "16", "0"], "codes is 0 and must be at least 1; it comes from --codes: give 1 or more"),
        (["--tokens", "3"], "64 tokens are drawn of 3; it comes from --drawn"),
    ],
)
def test_wrong_arguments(tool, capsys, words, message):
    with pytest.raises(SystemExit) as error:
        tool("__main__").main(["head", *words])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(tool):
    head, forms = tool("head"), tool("head_forms")
    losses = tuple(name for name in tool("setting").LOSSES if name not in forms.missing() and name != "cce")
    costs = head.run(forms.HeadSetting(512, 16384, 64, device="cuda", repeats=2, losses=losses))
    assert costs["loss"]["ours"]["peak_bytes"] < costs["loss"]["dense"]["peak_bytes"]
    assert torch.cuda.is_available()
