"""tools/bench quickstart: what it prints, what is left out, that its forms learn. No time is asserted."""

from __future__ import annotations

import json
import sys

import pytest

TOKENIZER = (
    *("--tokenizer", "data.batch=2", "data.train.image_size=8", "tokenizer.quantizer.num_codes=16"),
    *("tokenizer.quantizer.dim=4", "tokenizer.net.channels=16", "tokenizer.net.z_channels=16"),
)
PRIOR = ("--prior", "data.batch=2", "prior.net.width=16", "prior.net.num_layers=1", "prior.net.num_heads=2")
SMALL = (*TOKENIZER, *PRIOR, "--warm", "3", "--repeats", "2", "--threads", "1")


def test_without_the_packages_the_rest_is_measured_and_said(tool, capsys, monkeypatch):
    for package in ("transformers", "vector_quantize_pytorch"):
        monkeypatch.setitem(sys.modules, package, None)
    assert tool("quickstart").main([*SMALL, "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert {"quickstart", "config", "versions", "left_out", "machine", "commit", "command"} == report.keys()
    found = {part: set(forms) for part, forms in report["quickstart"].items()}
    assert found == {"tokenizer": {"ours", "ours, ema", "released", "floor"}, "prior": {"ours", "floor"}}
    rows = [row for forms in report["quickstart"].values() for row in forms.values()]
    assert all(0 < row[key] < float("inf") for row in rows for key in ("seconds", "processor"))
    assert report["config"]["tokenizer"] == {"batch": 2, "num_codes": 16, "dim": 4}
    assert report["config"]["prior"] == {"batch": 2, "tokens": 4, "width": 16}
    for package in ("transformers", "vector-quantize-pytorch"):
        assert f"{package} is left out: it is not installed; pip install -e '.[bench]'" in err


@pytest.mark.parametrize("part", ["tokenizers", "trained_priors"])
def test_every_form_learns_its_batch(tool, part):
    forms, command = tool("quickstart_forms"), tool("quickstart")
    tokenizer, prior = command.configs(command.arguments(SMALL))
    absent = {name: note for name in forms.PACKAGES if (note := tool("sample_forms").missing(name))}
    config = tokenizer if part == "tokenizers" else prior
    for name, step in getattr(forms, part)(config, "cpu", absent).items():
        losses = [float(step()) for _ in range(40)]
        assert losses[-1] < losses[3], f"{name}: {losses}"


def test_the_floor_is_all_products_of_a_step(tool):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    weight = torch.randn(8, 8, requires_grad=True)
    images = torch.randn(2, 3, 8, 8)
    kernel = torch.randn(4, 3, 3, 3, requires_grad=True)

    def step() -> None:
        found = (torch.conv2d(images, kernel, padding=1).relu() @ weight).square().sum()
        found.backward()

    with FlopCounterMode(display=False) as whole:
        step()
    form = tool("quickstart_forms").floor(step)
    with FlopCounterMode(display=False) as alone:
        form()
    assert alone.get_total_flops() == whole.get_total_flops() > 0


def test_the_table_has_ratios_of_ours(tool):
    quickstart, command = tool("quickstart"), tool("command")
    forms = {"ours": {"seconds": 2.0, "processor": 3.0}, "floor": {"seconds": 4.0, "processor": 1.5}}
    report = {"quickstart": {"prior": forms}} | command.origin("quickstart", [], "cpu", 1)
    rows = [line.split() for line in quickstart.table(report).splitlines()]
    assert ["floor", "4.000", "1.500", "2.00"] in rows


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "0"], "repeats is 0 and must be at least 1; it comes from --repeats"),
        (["--processes", "2"], "quickstart measures one process, but --processes is 2"),
        (["--warm", "2"], "the codes begin to act after 2 steps, and --warm is 2: give 3 or more"),
        (["--tokenizer", "tokenizer.quantiser.dim=4"], "did you mean tokenizer.quantizer"),
        (["--tokenizer", "tokenizer.quantizer={name: ema}"], "the plain loops are of images"),
    ],
)
def test_wrong_arguments(tool, capsys, words, message):
    with pytest.raises(SystemExit) as error:
        tool("__main__").main(["quickstart", *words])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
