"""YAML to dataclasses: values, keys, unions, overrides, and the places of errors."""

from __future__ import annotations

import pytest
from config_schemas import (
    Buggy,
    Derived,
    Divided,
    Flat,
    Levels,
    Nameless,
    Optim,
    ProbeTask,
    Residual,
    Run,
    Stage,
    TrainTask,
    load,
    problems_of,
    refused,
)

from vqscale import config


def test_every_kind_of_value(tmp_path):
    text = """
    # a comment
    steps: 100
    quantizer: {name: levels, levels: [8, 8, 6]}
    optim:
      lr: 1e-3
      betas: [0, 1.0e-1]
      warmup_steps: 5
    stages:
      - {width: 2, attend: true}
      - width: 6
    schedule: constant
    label: on
    shards: [a.tar, "b.tar"]
    teacher: null
    flag: true
    tags: []
    """
    got = load(tmp_path, text)
    assert got == Run(
        steps=100,
        quantizer=Levels(levels=(8, 8, 6)),
        optim=Optim(lr=0.001, betas=(0.0, 0.1), warmup_steps=5),
        stages=(Stage(2, True), Stage(6)),
        schedule="constant",
        label="on",
        shards=("a.tar", "b.tar"),
        teacher=None,
        flag=True,
        tags=(),
    )
    assert type(got.optim.betas[0]) is float
    assert hash(got) == hash(load(tmp_path, text))


def test_defaults_fill_what_is_not_given(tmp_path):
    assert load(tmp_path, "steps: 1") == Run(steps=1)
    # what is not given below a field with a default comes from that default, not from the class
    assert load(tmp_path, "steps: 1\noptim: {warmup_steps: 1}").optim == Optim(lr=0.5, warmup_steps=1)
    assert load(tmp_path, "steps: 1\nquantizer: {name: flat}").quantizer == Flat(num_codes=99)
    assert load(tmp_path, "steps: 1\nquantizer: {temperature: 2}").quantizer == Flat(num_codes=99, temperature=2.0)
    assert load(tmp_path, "steps: 1\nquantizer: {name: levels}").quantizer == Levels()
    # null is replaced by the class's own values where an optional dataclass is begun
    assert load(tmp_path, "steps: 1\nteacher: {}").teacher == Optim()


@pytest.mark.parametrize(
    "text", ["on", "yes", "No", "off", "True", "1_000", "1:30", "007", "0x1f", "2024-01-01", ".nan", "e3"]
)
def test_words_that_yaml_takes_for_values_stay_text(tmp_path, text):
    assert load(tmp_path, f"steps: 1\nlabel: {text}").label == text


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1", 1.0),
        ("-1.5", -1.5),
        ("+.5", 0.5),
        ("2.", 2.0),
        ("1E6", 1e6),
        ("1.0e+6", 1e6),
    ],
)
def test_numbers_of_a_float(tmp_path, text, value):
    got = load(tmp_path, f"steps: 1\noptim: {{betas: [{text}, 0]}}").optim.betas[0]
    assert got == value
    assert type(got) is float


WRONG = """
steps: 1_000 -> steps: expected int, found the text '1_000'; write plain digits, like 1000
steps: 1:30 -> steps: expected int, found the text '1:30'; write plain digits, like 1000
steps: '5' -> steps: expected int, found the text '5'; write plain digits, like 1000
steps: 1e6 -> steps: expected int, found 1000000.0; write 1000000
steps: 1.5 -> steps: expected int, found 1.5; write plain digits, like 1000
steps: true -> steps: expected int, found true; write plain digits, like 1000
steps: -> steps: expected int, found null; write plain digits, like 1000
steps: [1] -> steps: expected int, found a list; write plain digits, like 1000
flag: on -> flag: expected bool, found the text 'on'; write true or false
flag: 1 -> flag: expected bool, found 1; write true or false
label: 3 -> label: expected str, found 3; put it in quotes: '3'
label: true -> label: expected str, found true; put it in quotes: 'true'
optim: {lr: true} -> optim.lr: expected float, found true; write it like 1000, 0.5 or 1e-3
optim: {lr: .nan} -> optim.lr: expected float, found the text '.nan'; write it like 1000, 0.5 or 1e-3
optim: {lr: .inf} -> optim.lr: expected float, found .inf; write it like 1000, 0.5 or 1e-3
optim: {betas: [0, -.inf]} -> optim.betas.1: expected float, found -.inf; write it like 1000, 0.5 or 1e-3
optim: {warmup_steps: x} -> optim.warmup_steps: expected int, found the text 'x'; write plain digits, like 1000
optim: {betas: 0.9} -> optim.betas: expected a list [float, float], found 0.9; write it in [ ]
optim: {betas: [1]} -> optim.betas: expected a list of 2, [float, float], found one of 1; give 2
optim: {betas: [a, 0]} -> optim.betas.0: expected float, found the text 'a'; write it like 1000, 0.5 or 1e-3
optim: 3 -> optim: expected {...}, found 3; write its keys indented below it
optim: -> optim: expected {...}, found null; write its keys indented below it
schedule: cosin -> schedule: expected constant | cosine, found the text 'cosin'; did you mean cosine?
schedule: 7 -> schedule: expected constant | cosine, found 7; choose one of them
shards: 7 -> shards: expected str or [str, ...], found 7; write one of these
shards: [7] -> shards.0: expected str, found 7; put it in quotes: '7'
stages: [{}] -> stages.0.width: this key is required; add it: int
quantizer: flat -> quantizer: expected {name: flat | levels | residual, ...}, found the text 'flat'; write its
quantizer: {name: flap} -> quantizer.name: expected flat | levels | residual, found the text 'flap'; did you mean
"""


@pytest.mark.parametrize("row", WRONG.strip().splitlines())
def test_wrong_values_say_what_was_found_and_expected(tmp_path, row):
    line, message = row.split(" -> ")
    text = line if line.startswith("steps") else f"{line}\nsteps: 1\n"
    (problem,) = refused(tmp_path, text)
    assert problem.startswith(f"run.yaml:1: {message}")


def test_unknown_keys_name_the_nearest(tmp_path):
    text = "steps: 1\n\noptim:\n  lerning_rate: 3\n  warmup: 3\nschedul: cosine\nwidth: 3\nlr: 1\nqqq: 1\n"
    assert refused(tmp_path, text) == [
        "run.yaml:6: schedul: unknown key; did you mean schedule?",
        "run.yaml:7: width: unknown key; the keys here are " + ", ".join(config.to_dict(Run(1))),
        "run.yaml:8: lr: unknown key; did you mean optim.lr?",
        "run.yaml:9: qqq: unknown key; the keys here are " + ", ".join(config.to_dict(Run(1))),
        "run.yaml:4: optim.lerning_rate: unknown key; the keys here are lr, betas, warmup_steps",
        "run.yaml:5: optim.warmup: unknown key; did you mean optim.warmup_steps?",
    ]


def test_missing_keys_and_missing_names(tmp_path):
    assert refused(tmp_path, "flag: true\n") == ["run.yaml:1: steps: this key is required; add it: int"]
    text = "steps: 1\nquantizer:\n  name: residual\n  inner:\n    depth: 2\n"
    name = "this key is required, as it decides which others there are; choose flat | levels | residual"
    assert refused(tmp_path, text) == [f"run.yaml:4: quantizer.inner.name: {name}"]


def test_equal_keys_are_refused_with_both_lines(tmp_path):
    assert refused(tmp_path, "steps: 1\nflag: true\noptim:\n  lr: 1\n  lr: 2\nsteps: 3\n") == [
        "run.yaml:5: optim.lr: this key was already given, at run.yaml:4; keep one",
        "run.yaml:6: steps: this key was already given, at run.yaml:1; keep one",
    ]


def test_all_problems_come_together(tmp_path):
    text = """steps: 3
quantizer:
  num_codes: 0
optim:
  lr: -1
  betas: [0.9, 1]
stages:
  - width: 3
  - width: two
flag: maybe
flags: true
"""
    got = refused(tmp_path, text, "optim.warmup_steps=7", "label=3", "teacher={lr: 0}")
    assert got == [
        "run.yaml:11: flags: unknown key; did you mean flag?",
        "run.yaml:3: quantizer.num_codes: num_codes is 0: use at least 1",
        "run.yaml:5: optim.lr: lr is -1.0: make it positive",
        "run.yaml:6: optim.betas.1: the second beta is 1.0: keep it below 1",
        "run.yaml:8: stages.0.width: width is 3: make it even",
        "run.yaml:9: stages.1.width: expected int, found the text 'two'; write plain digits, like 1000",
        "command line: label: expected str, found 3; put it in quotes: '3'",
        "command line: teacher.lr: lr is 0.0: make it positive",
        "run.yaml:10: flag: expected bool, found the text 'maybe'; write true or false",
    ]


def test_places_of_range_problems(tmp_path):
    # the run's own check needs all of its parts, and names what it is about, wherever that came from
    text = "steps: 3\noptim:\n  warmup_steps: 4\n"
    assert refused(tmp_path, text) == ["run.yaml:3: optim.warmup_steps: 4 steps of 3: use fewer"]
    assert refused(tmp_path, text, "optim.warmup_steps=5") == [
        "command line: optim.warmup_steps: 5 steps of 3: use fewer"
    ]


def test_a_check_may_stumble_over_what_it_has_reported_but_over_nothing_else():
    assert problems_of(config.parse, Divided, {}) == ["default: size: size is 0: use at least 1"]
    assert problems_of(config.parse, Divided, {"size": 5}) == ["the given mapping: 2 is in the way"]
    with pytest.raises(KeyError, match="a mistake in a check"):
        config.parse(Buggy, {})


def test_derived_fields_are_no_keys(tmp_path):
    got = load(tmp_path, "dim: 8", schema=Derived)
    assert got.width == 4
    assert config.to_dict(got) == {"dim": 8, "heads": 2}
    assert refused(tmp_path, "width: 8\ndim: -1\n", schema=Derived) == [
        "run.yaml:1: width: unknown key; the keys here are dim, heads",
        "run.yaml:1: dim is -1: make it positive",
    ]


def test_unions_of_configs_may_hold_themselves(tmp_path):
    inner = "\n    name: residual\n    depth: 3\n    inner: {name: levels}\n"
    text = f"steps: 1\nquantizer:\n  name: residual\n  inner:{inner}"
    assert load(tmp_path, text).quantizer == Residual(inner=Residual(inner=Levels(), depth=3))
    deep = text.replace("levels", "flat, num_codes: -1")
    assert refused(tmp_path, deep) == ["run.yaml:7: quantizer.inner.inner.num_codes: num_codes is -1: use at least 1"]


def test_the_root_may_be_a_union(tmp_path):
    assert load(tmp_path, "task: probe\nfolder: x\n", schema=TrainTask | ProbeTask) == ProbeTask(folder="x")
    (problem,) = refused(tmp_path, "folder: x\n", schema=TrainTask | ProbeTask)
    assert problem.startswith("run.yaml:1: task: this key is required")
    assert problem.endswith("choose train | probe")
    assert "task, steps, folder" in refused(tmp_path, "", schema=TrainTask | ProbeTask)[0]


def test_a_union_without_names_is_a_mistake_of_ours():
    with pytest.raises(TypeError, match="nothing tells TrainTask, Nameless apart"):
        config.parse(TrainTask | Nameless, {})


def test_settings_of_the_replaced_choice_are_not_dropped(tmp_path):
    text = "steps: 1\nquantizer:\n  name: flat\n  temperature: 2\n"
    assert refused(tmp_path, text, "quantizer.name=levels") == [
        "run.yaml:4: quantizer.temperature: unknown key for name levels; it belongs to flat; remove it, or replace all "
        "that name flat (run.yaml:3) had by quantizer='{name: levels}'"
    ]
    assert load(tmp_path, text, "quantizer={name: levels}").quantizer == Levels()
    text = "steps: 1\nquantizer:\n  name: levels\n  temperature: 2\n"
    assert refused(tmp_path, text) == [
        "run.yaml:4: quantizer.temperature: unknown key for name levels; it belongs to flat; remove it"
    ]


def test_overrides_go_over_the_file(tmp_path):
    text = "steps: 1\nstages: [{width: 2}, {width: 4}]\nteacher: null\nlabel: x\n"
    got = load(
        tmp_path,
        text,
        "optim.lr=1e-4",
        "optim.betas=[0.5, 0.75]",
        "stages.1.width=8",
        "teacher.lr=3",
        "steps=7",
        "steps=8",
        "label=a=b",
        "quantizer.num_codes=5",
        "flag=true",
        "shards=pipe:cat /data/{00..11}.tar",
    )
    assert got == Run(
        steps=8,
        optim=Optim(lr=1e-4, betas=(0.5, 0.75)),
        stages=(Stage(2), Stage(8)),
        teacher=Optim(lr=3.0),
        label="a=b",
        quantizer=Flat(num_codes=5),
        flag=True,
        shards="pipe:cat /data/{00..11}.tar",
    )
    assert load(tmp_path, "steps: 1\nteacher: {lr: 1}", "teacher=null").teacher is None


def test_bad_overrides_name_the_command_line_and_the_nearest_key(tmp_path):
    assert refused(
        tmp_path, "steps: 1", "optm.lr=3", "optim.larning=3", "quantizer.inner.lvels=3", "nothing.here=1"
    ) == [
        "command line: optm: unknown key; did you mean optim?",
        "command line: nothing: unknown key; the keys here are " + ", ".join(config.to_dict(Run(1))),
        "command line: quantizer.inner: unknown key for name flat; it belongs to residual; remove it",
        "command line: optim.larning: unknown key; the keys here are lr, betas, warmup_steps",
    ]
    assert refused(tmp_path, "steps: 1", "optim.warmup", "=3", "flag=[", "steps=1_0") == [
        "command line: optim.warmup: an override is key=value; did you mean optim.warmup_steps=...?",
        "command line: =3: an override is key=value; did you mean key=...?",
        "command line: '[' is not YAML: while parsing a flow node expected the node content, but found '<stream end>'; "
        "correct it, or put the text in quotes",
        "command line: steps: expected int, found the text '1_0'; write plain digits, like 1000",
    ]
    (problem,) = refused(tmp_path, "steps: 1", "label=")
    assert problem == "command line: label: expected str, found null; put it in quotes: 'null'"
