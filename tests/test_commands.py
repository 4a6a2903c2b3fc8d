"""The command vqscale, and every command that a README shows: each is read by the parser and the checks of its program,
so a wrong option, a wrong value or a wrong key fails here. Those that are short are run, see test_readme.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.lib import shown
from vqscale import __main__ as command
from vqscale import config as configuration
from vqscale.programs.commands import COMMANDS, words
from vqscale.run import checkout
from vqscale.train.config import Run

ROOT = Path(__file__).resolve().parents[1]
OTHERS = ("bash ", "source ", "python -m pytest", "pip install", "tensorboard ")  # these start no program of ours
SHOWN = [line for line in shown.commands() if not line.startswith(OTHERS)]


def _short(value):
    return value[:60] if isinstance(value, str) else None


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with what the commands of the READMEs name: the configs, a run of a prior, files of weights."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    prior = configuration.load(Run, ROOT / "configs/quickstart/prior.yaml")
    for name in ("quickstart-prior", "mine-prior"):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "run.yaml").write_text(configuration.dump(prior))
    for name in ("reference.npz", "pt_inception-2015-12-05-6726825d.pth"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("line", SHOWN, ids=_short)
def test_a_shown_command_is_one_that_its_program_takes(place, line):
    found = shown.program(line)
    assert found, f"say in OTHERS that this starts no program of ours, or show one that is: {line}"
    shown.check(*found)


@pytest.mark.parametrize("wrong", [["--nonsense", "3"], ["run.stepz=3"]], ids=["option", "key"])
@pytest.mark.parametrize("line", [line for line in SHOWN if "--help" not in line], ids=_short)
def test_a_shown_command_with_a_wrong_word_is_refused(place, line, wrong):
    """Otherwise the test above could not fail."""
    name, given = shown.program(line)
    if name == "plan" and "--check" in given and "=" in wrong[0]:
        pytest.skip("it reads no config")
    with pytest.raises((ValueError, SystemExit)) as refused:
        shown.check(name, [*given, *wrong])
    assert not isinstance(refused.value, SystemExit) or refused.value.code == 2


def test_help_lists_every_program_at_once():
    code = "import sys; from vqscale.__main__ import main; main(['--help']); print({'torch', 'yaml'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    for name, (_, what) in COMMANDS.items():
        assert f"  {name:12}{what}" in lines
    assert lines[-1] == "set()"


def test_every_file_of_commands_is_a_program_or_serves_them():
    files = {path.stem for path in (ROOT / "vqscale/programs/commands").glob("*.py")}
    assert files - {file for file, _ in COMMANDS.values()} == {"__init__", "words", "drawing"}


@pytest.mark.parametrize("name", [name for name in COMMANDS if name not in ("train", "study", "summary", "bench")])
def test_a_program_is_called_as_it_was_started(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vqscale", name, "--help"])
    with pytest.raises(SystemExit) as done:
        command.main()
    assert done.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: vqscale {name} ")


@pytest.mark.parametrize(
    ("given", "status", "told"),
    [
        ([], 2, ""),
        (["--version"], 0, ""),
        (["trian"], 2, "error: no program is named 'trian': did you mean train? There are train, encode, evaluate, "),
        (["zzz"], 2, "error: no program is named 'zzz': There are train, encode, "),
    ],
)
def test_what_names_no_program(given, status, told, capsys):
    assert command.main(given) == status
    assert capsys.readouterr().err.startswith(told)


@pytest.mark.slow
def test_the_benchmark_is_a_program_of_any_folder(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    small = ["--codes", "64", "--tokens", "16", "--dim", "8"]
    command = [sys.executable, "-m", "vqscale", "bench", "memory", *small]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "MiB of one IBQ step: 16 tokens per process" in done.stdout


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], (None, [])),
        (["a.yaml", "optim.lr=1"], (Path("a.yaml"), ["optim.lr=1"])),
        (["run.steps=3", "runs/x=1/c.yaml", "data.val=a"], (Path("runs/x=1/c.yaml"), ["run.steps=3", "data.val=a"])),
        (["./x=1.yaml", "run.folder=./a=b"], (Path("x=1.yaml"), ["run.folder=./a=b"])),
        (["/data/k=v/c.yaml"], (Path("/data/k=v/c.yaml"), [])),
    ],
)
def test_a_path_may_have_an_equals_sign_after_a_slash(given, expected):
    assert words.config_and_changes(given) == expected


@pytest.mark.parametrize("given", [["--dry"], ["a.yaml", "b.yaml"], ["a.yaml", "-x"]])
def test_words_that_are_neither_a_config_nor_a_change(given):
    with pytest.raises(ValueError, match=r"is neither an option nor key=value, and there is one CONFIG"):
        words.config_and_changes(given)


@pytest.mark.parametrize("name", ["train", "plan", "summary"])
def test_without_a_checkout_a_config_has_to_be_given(name, monkeypatch, capsys):
    monkeypatch.setattr(checkout, "checkout", lambda: None)
    assert command.main([name]) == 2
    assert "which is taken then, is in the repository" in capsys.readouterr().err
