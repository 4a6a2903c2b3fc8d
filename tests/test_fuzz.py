"""Configs and command lines that nobody would write: each is taken, or refused in words; no traceback, no hang, and
nothing written.

A seed is drawn for every run of these tests and told where they fail: with VQSCALE_FUZZ_SEED the cases are the same.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import random
import signal
from importlib import import_module
from pathlib import Path

import pytest

from tests.lib import shown
from vqscale import config as configuration
from vqscale.plan import costs_of
from vqscale.programs.claims.config import ClaimsConfig
from vqscale.programs.commands import COMMANDS
from vqscale.programs.studies.config import StudyConfig
from vqscale.train.config import Run

ROOT = Path(__file__).resolve().parents[1]
SEED = int(os.environ.get("VQSCALE_FUZZ_SEED") or random.SystemRandom().randrange(10**9))
FILES = sorted((ROOT / "configs").rglob("*.yaml"))
SCHEMAS = {"study": StudyConfig, "claims": ClaimsConfig}  # of a folder of configs; others are runs
LINES = [line for line in shown.commands() if shown.program(line)]
LONGEST_S = 60
MAKERS = ("bench", "shards", "classifier", "soak")  # take no input, and so do what they are asked for
PLANNED = {"train": "--dry-run", "study": "--dry-run", "claims": "--list"}

PLAIN = (
    "0 -1 1 2 3 7 1000000 1e308 1e309 -0.0 .inf -.inf .nan nan 1e-3 0.5 1_0 0x10 007 1:30 on yes true false null ~ text"
)
YAML = (
    "{} [] [[1]] [null] *alias {a:b} - ' \" { [ # & !tag '' \"\" \u00e9\u4e2d \\0 .. /dev/null pipe:true a-{0..3}.tar"
)
LONG = ["9" * 400, "9" * 6000, "[" * 2000, "{a: " * 2000, "x" * 20_000, "1" + "0" * 13, str(2**63)]
MORE = [
    "a b",
    "a: b",
    "{a: b}",
    "[1, a]",
    "{name: ibq}",
    "{name: nobody}",
    "&anchor 1",
    "!!python/name:os.system 1",
    "- 1",
]
VALUES = [*PLAIN.split(), *YAML.split(), *LONG, *MORE]


@functools.cache
def leaves(schema: object, path: Path) -> list[str]:
    """Lines of the config, all keys written out."""
    return configuration.dump(configuration.load(schema, path)).splitlines()


def mangled(lines: list[str], draw: random.Random) -> str:
    """The text with one to three faults in it."""
    lines = list(lines)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        fault = draw.randrange(8)
        if fault < 4 and colon:
            lines[at] = f"{key}: {draw.choice(VALUES)}"
        elif fault == 4:
            del lines[at]
        elif fault == 5:
            lines.insert(at, lines[draw.randrange(len(lines))])
        elif fault == 6:
            lines[at] = " " * draw.randint(0, 9) + lines[at].lstrip()
        else:
            place = draw.randrange(len(lines[at]) + 1)
            lines[at] = lines[at][:place] + draw.choice("{}[]:#&*!|>'\"%@`,?-\t\x07\u2028 ") + lines[at][place:]
        lines = lines or [""]
    return "\n".join(lines) + "\n"


def words_of(given: list[str], draw: random.Random) -> list[str]:
    """A command with one or two faults in its words."""
    given = list(given)
    for _ in range(draw.randint(1, 2)):
        at = draw.randrange(len(given) + 1)
        fault = draw.randrange(5)
        if fault == 0:
            given.insert(
                at, draw.choice(["--nonsense", "-", "--", "-x", "--world", "--out", "--key", "key", "=", "=1", "a="])
            )
        elif fault == 1 and at < len(given):
            del given[at]
        elif fault == 2 and at < len(given):
            given[at] = draw.choice(VALUES).replace("\0", "")
        elif fault == 3 and at < len(given):
            given[at] = given[at].partition("=")[0] + "=" + draw.choice(VALUES)
        else:
            given.insert(at, draw.choice(VALUES))
    return given


def is_refusal(error: BaseException, said: str) -> bool:
    """Whether an error tells a user something: a ValueError of ours in words, or a program that has told it."""
    if isinstance(error, SystemExit):
        return error.code in (0, 2) and bool(said)
    return type(error) in (ValueError, configuration.ConfigError) and len(str(error)) > 10


@contextlib.contextmanager
def refused_or_taken(what: str, number: int):
    """Whatever is raised inside is a refusal in words, in good time; what else it is fails, with its seed."""
    told = f"VQSCALE_FUZZ_SEED={SEED}, case {number}: {what[:2000]}"
    said = io.StringIO()

    def late(*_: object) -> None:
        raise TimeoutError(told)

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST_S)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            yield said
    except BaseException as error:
        if not is_refusal(error, said.getvalue()):
            raise AssertionError(f"{told}: {type(error).__name__}: {str(error)[:500]}") from error
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _configs(count: int, folder: Path, plan: bool) -> None:
    for number in range(count):
        draw = random.Random(f"{SEED} config {number}")
        path = draw.choice(FILES)
        schema = SCHEMAS.get(path.parent.name, Run)
        text = mangled(leaves(schema, path), draw)
        (folder / "run.yaml").write_text(text)
        with refused_or_taken(f"{path.name}: {text}", number):
            config = configuration.load(schema, folder / "run.yaml")
            if schema is Run:
                config.check_world(world := draw.choice([1, 2, 8]))
                if plan and not number % 6:
                    costs_of(config, world).text()
            assert configuration.load(schema, folder / "run.yaml") == config
        assert [path.name for path in folder.iterdir()] == ["run.yaml"]


def _commands(count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(folder)
    for number in range(count):
        draw = random.Random(f"{SEED} command {number}")
        name, given = shown.program(draw.choice(LINES))
        given = words_of(given, draw)
        with refused_or_taken(f"{name} {given}", number):
            shown.check(name, given)
        assert [path.name for path in folder.iterdir()] == ["configs"], (SEED, number, name, given)


def _programs(count: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole programs, which find nothing of what they are given, or plan alone: they end before processes meet."""
    (folder / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(folder)
    lines = [line for line in LINES if shown.program(line)[0] not in MAKERS]
    for number in range(count):
        draw = random.Random(f"{SEED} program {number}")
        name, given = shown.program(draw.choice(lines))
        given = words_of(given, draw)
        if name in PLANNED:  # first, so that no option takes it for its value
            given.insert(0, PLANNED[name])
        with refused_or_taken(f"{name} {given}", number) as said:
            status = import_module(f"vqscale.programs.commands.{COMMANDS[name][0]}").main(given)
            told = said.getvalue()
            if status not in (0, 1, 2) or "Traceback" in told or (status and "error: " not in told):
                raise AssertionError(f"status {status}: {told[-2000:]}")
        assert [path.name for path in folder.iterdir()] == ["configs"], (SEED, number, name, given)


def test_configs_that_nobody_would_write(tmp_path):
    _configs(60, tmp_path, plan=False)


def test_commands_that_nobody_would_write(tmp_path, monkeypatch):
    _commands(60, tmp_path, monkeypatch)


def test_programs_that_nobody_would_start(tmp_path, monkeypatch):
    _programs(15, tmp_path, monkeypatch)


@pytest.mark.slow
def test_six_hundred_configs_and_what_a_hundred_of_them_would_cost(tmp_path):
    _configs(600, tmp_path, plan=True)


@pytest.mark.slow
def test_four_hundred_commands(tmp_path, monkeypatch):
    _commands(400, tmp_path, monkeypatch)


@pytest.mark.slow
def test_sixty_programs(tmp_path, monkeypatch):
    _programs(60, tmp_path, monkeypatch)
