"""tools/bench sample: what it prints, that its forms have the same shape, what is left out. No time is asserted."""

from __future__ import annotations

import json
import sys

import pytest

WORDS = ("--batch", "2", "--side", "2", "--codes", "50", "70", "--width", "16", "--layers", "1", "--heads", "2")
STEPS = ("--steps", "3", "--clusters", "5")
SMALL = (*WORDS, *STEPS, "--repeats", "1", "--threads", "1")


def test_without_transformers_the_rest_is_measured_and_said(tool, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert tool("sample").main([*SMALL, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert [one["config"]["codes"] for one in report["sample"]] == [50, 70]
    ours = {"autoregressive", "unpacked", "bf16", "products", "confidence", "halton", "coarse_to_fine"}
    for one in report["sample"]:
        assert set(one["forms"]) == ours
        assert all(row["seconds"] > 0 for row in one["forms"].values())
    assert "transformers is left out: it is not installed; pip install -e '.[bench]'" in err


def test_the_table_has_ratios_to_transformers(tool):
    command, sample, setting = tool("command"), tool("sample"), tool("setting")
    config = vars(setting.SampleSetting(8, 16, 2**14, 384, 6, 6))
    forms = {
        "autoregressive": {"seconds": 2.0, "processor": 3.0},
        "transformers": {"seconds": 4.0, "processor": 6.0},
    }
    report = {"sample": [{"forms": forms, "config": config}]} | command.origin("sample", [], "cpu", 1)
    rows = [line.split() for line in sample.table(report).splitlines()]
    assert ["autoregressive", "2.000", "3.000", "0.50", "4.00"] in rows
    assert ["transformers", "4.000", "6.000", "1.00", "2.00"] in rows


def test_a_llama_of_the_same_shape_has_the_same_matrices(tool):
    library = pytest.importorskip("transformers")
    forms, setting = tool("sample_forms"), tool("setting")
    asked = setting.SampleSetting(2, 2, 50, 16, 2, 2, steps=3, clusters=5)
    assert library.LlamaConfig  # what generate draws is length ids after the first
    assert forms.build(asked)["transformers"]().shape == (2, 1 + 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--batch", "0"], "batch is 0 and must be at least 1; it comes from --batch"),
        (["--side", "3"], "12 steps of a masked prior reveal at least an id each, and an image has 9"),
        (["--codes", "256", "4096"], "512 clusters of 256 codes: none is empty"),
        (["--processes", "2"], "generate draws on one process, but --processes is 2"),
        (["--heads", "5"], "width 384 cut into 5 heads must give heads of a multiple of 4"),
    ],
)
def test_wrong_arguments(tool, capsys, words, message):
    with pytest.raises(SystemExit) as error:
        tool("__main__").main(["sample", *words])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
