"""Configs as text and as plain data: files that are none, dumps that load again, the help, the differences."""

from __future__ import annotations

import random
import subprocess
import sys

import pytest
import yaml
from config_schemas import (
    Flat,
    Levels,
    NamedOptim,
    Odd,
    Optim,
    ProbeTask,
    Quantizer,
    Residual,
    Run,
    Stage,
    TrainTask,
    load,
    problems_of,
    refused,
)

from vqscale import config


def test_files_that_are_no_config(tmp_path):
    keys = ", ".join(config.to_dict(Run(1)))
    assert refused(tmp_path, "") == [
        f"run.yaml: a config is a mapping of keys to values, the file is empty; its keys are {keys}"
    ]
    assert refused(tmp_path, "# only this\n")[0].startswith(
        "run.yaml: a config is a mapping of keys to values, the file is"
    )
    assert "found a list; its keys are steps" in refused(tmp_path, "- 1\n- 2\n")[0]
    assert "found the text 'hello'" in refused(tmp_path, "hello\n")[0]
    assert refused(tmp_path, "steps: 1\nflag: [1, 2\nlabel: x\n")[0].startswith("run.yaml:3: this is not YAML: ")
    assert refused(tmp_path, "steps: 1\n\tflag: 2\n")[0].startswith("run.yaml:2: this is not YAML: ")
    assert refused(tmp_path, "steps: 1\n---\nsteps: 2\n")[0].startswith(
        "run.yaml:2: this is not YAML: expected a single"
    )
    assert refused(tmp_path, "steps: \x07\n")[0].startswith("run.yaml: this is not YAML: ")
    assert "aliases (*name) are not read" in refused(tmp_path, "steps: &a 1\nlabel: *a\n")[0]
    assert refused(tmp_path, "steps: !!python/name:os.system x\n")[0].startswith("run.yaml:1: steps: the tag")
    assert refused(tmp_path, "steps: 1\n? [a]\n: 2\n")[0].startswith("run.yaml:2: top level: a key is one word")

    (problem,) = problems_of(config.load, Run, tmp_path / "runn.yaml")
    assert problem.startswith("runn.yaml: there is no such file (looked from ")
    assert problem.endswith("did you mean run.yaml?")
    assert "give the path of a YAML file" in problems_of(config.load, Run, tmp_path / "no" / "run.yaml")[0]
    assert "this cannot be read: " in problems_of(config.load, Run, tmp_path)[0]
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in problems_of(config.load, Run, tmp_path / "bytes.yaml")[0]


FULL = Run(
    steps=3,
    quantizer=Residual(inner=Residual(inner=Levels(levels=()))),
    optim=Optim(lr=1e-5, betas=(0.1 + 0.2, 1e-300)),
    stages=(),
    label="yes",
    shards=("1e-3", "null", "a, b", "#x", "x: y"),
    teacher=Optim(lr=1e299, warmup_steps=0),
    tags=(
        "",
        " ",
        "~",
        "007",
        "12",
        "true",
        "a\nb",
        "é☃😀",
        "'",
        '"',
        "1.5",
        ".inf",
        "- a",
        "{0..3}.tar",
        "\x85",
        "\\n",
    ),
)


@pytest.mark.parametrize("comments", [False, True])
def test_dump_loads_to_an_equal_config(tmp_path, comments):
    for full in (FULL, Run(steps=1)):
        text = config.dump(full, comments=comments)
        assert load(tmp_path, text) == full
        # who reads it with plain PyYAML sees the same values
        assert yaml.safe_load(text) == config.to_dict(full)
    assert load(tmp_path, config.dump(ProbeTask(), comments=comments), schema=TrainTask | ProbeTask) == ProbeTask()


def test_dump_of_random_text_and_numbers(tmp_path):
    draw = random.Random(0)
    signs = "ab01 9eE+-._:#,[]{}'\"\\\n\t&*!|>%@`~?=/\u00e9\u2028\U0001f600"
    for _ in range(40):
        words = tuple("".join(draw.choices(signs, k=draw.randrange(8))) for _ in range(8))
        lr = draw.uniform(1, 10) * 10.0 ** draw.randrange(-300, 300)
        full = Run(steps=draw.randrange(10**18), label=words[0], shards=words[1], tags=words, optim=Optim(lr=lr))
        assert load(tmp_path, config.dump(full)) == full


def test_dump_reads_as_a_person_would_write_it():
    assert (
        config.dump(Run(steps=1, optim=Optim(lr=1e-5)))
        == """\
steps: 1
quantizer:
  name: flat
  num_codes: 99
  temperature: 1.0
optim:
  lr: 1.0e-05
  betas: [0.9, 0.95]
  warmup_steps: null
stages:
  - width: 4
    attend: false
  - width: 8
    attend: true
schedule: cosine
label: run
shards: []
teacher: null
flag: false
tags: [a]
"""
    )
    lines = config.dump(Run(steps=1), comments=True).splitlines()
    assert lines[0] == "steps: 1  # optimiser steps"
    assert "  warmup_steps: null  # steps of growth; null: none" in lines
    assert "  - width: 4  # channels" in lines


def test_the_name_comes_before_what_is_inherited():
    assert list(config.to_dict(NamedOptim())) == ["name", "lr", "betas", "warmup_steps"]
    lines = config.dump(NamedOptim(), comments=True).splitlines()
    assert lines[:2] == ["name: named  # with a name below what it inherits", "lr: 0.001  # peak learning rate"]


def test_to_dict_is_plain_and_parses_back():
    data = config.to_dict(FULL)
    assert data["optim"]["betas"] == [0.1 + 0.2, 1e-300]
    assert data["quantizer"]["inner"]["inner"] == {"name": "levels", "levels": []}
    assert config.parse(Run, data) == FULL


def test_differences_name_dotted_keys_and_both_values():
    old = config.to_dict(Run(steps=1, optim=Optim(lr=1e-5)))
    new = config.to_dict(Run(steps=1, quantizer=Levels(), stages=(Stage(4), Stage(10, True)), tags=("a", "b")))
    assert config.differences(old, new) == [
        "quantizer.name: flat -> levels",
        "quantizer.num_codes: 99 -> (absent)",
        "quantizer.temperature: 1.0 -> (absent)",
        "optim.lr: 1.0e-05 -> 0.5",
        "stages.1.width: 8 -> 10",
        "tags: [a] -> [a, b]",
        "quantizer.levels: (absent) -> [8, 5]",
    ]
    assert config.differences(old, old) == []


def test_parse_takes_plain_data():
    got = config.parse(
        Quantizer, {"name": "residual", "inner": Flat(num_codes=3), "depth": 4}, source="quantizers.build"
    )
    assert got == Residual(inner=Flat(num_codes=3), depth=4)
    assert config.parse(Levels, {"levels": (2, 3)}) == Levels(levels=(2, 3))
    assert problems_of(config.parse, Quantizer, {"name": "flat", "num_code": 3}, "quantizers.build") == [
        "quantizers.build: num_code: unknown key; did you mean num_codes?"
    ]
    assert problems_of(config.parse, Optim, {"lr": float("nan"), "betas": {1, 2}, "warmup_steps": "3"}) == [
        "the given mapping: lr: expected float, found .nan; write it like 1000, 0.5 or 1e-3",
        "the given mapping: betas: expected a list [float, float], found a set; write it in [ ]",
        "the given mapping: warmup_steps: expected int, found the text '3'; write plain digits, like 1000",
    ]


def test_fields_of_other_types_are_a_mistake_of_ours():
    with pytest.raises(TypeError, match="sizes: a config has no fields of type"):
        config.parse(Odd, {"sizes": [1]})


def test_nothing_heavy_is_imported():
    code = (
        "import vqscale.config, sys; print([name for name in ('torch', 'numpy', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_a_key_of_a_config_is_told_as_on_a_command_line():
    full = Run(steps=1, label="a #b", optim=Optim(lr=1e-5))
    assert [config.text_of(full, key) for key in ("steps", "label", "tags", "optim.lr", "optim.warmup_steps")] == [
        *("1", "a #b", "[a]", "1.0e-05", ""),
    ]
    assert config.text_of(full, "teacher.lr") == ""
    with pytest.raises(ValueError, match=r"no key optim\.lt here; did you mean optim\.lr"):
        config.text_of(full, "optim.lt")
