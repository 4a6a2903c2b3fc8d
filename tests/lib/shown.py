"""The commands that the Markdown files of this repository show, and which program each of them starts with what."""

from __future__ import annotations

import re
import shlex
import subprocess
from importlib import import_module
from pathlib import Path

from vqscale import config as configuration
from vqscale.programs.claims.config import ClaimsConfig
from vqscale.programs.commands import COMMANDS
from vqscale.programs.studies.config import StudyConfig
from vqscale.train.config import Run

ROOT = Path(__file__).resolve().parents[2]
# Told to whoever makes files of tests again with an old commit; and of what a page adds first (test_pages_followed.py).
ELSEWHERE = ("tests/", "vqscale/ADDING.md")
TOLD = re.compile(r"is `vqscale (\w+) \.\.\.`")
FILES = {"launch/train.py": "train", "tools/bench": "bench"} | {
    f"tools/{path.name}": TOLD.search(path.read_text())[1] for path in (ROOT / "tools").glob("*.py")
}


def commands(page: str = "*.md") -> list[str]:
    """The lines of all blocks of bash, without what a comment says beside them."""
    listed = subprocess.run(["git", "ls-files", page], cwd=ROOT, capture_output=True, text=True, check=True)
    blocks = [
        block
        for name in listed.stdout.split()
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / name).read_text(), re.S)
        if not name.startswith(ELSEWHERE) or name == page
    ]
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return list(dict.fromkeys(line for line in lines if line and not line.startswith("#")))


def program(command: str) -> tuple[str, list[str]] | None:
    """(program of vqscale, its words) of a command; None where it starts something else."""
    first, *rest = shlex.split(command)
    if first == "sbatch":
        script = rest.index("launch/slurm/train.sbatch")
        named = FILES.get(rest[script + 1])
        return (named, rest[script + 2 :]) if named else ("train", rest[script + 1 :])
    if first == "vqscale":
        return rest[0], rest[1:]
    if first == "torchrun":
        while rest[0].startswith("-") and rest[0] != "-m":
            del rest[0]
        if rest[:2] == ["-m", "vqscale"]:
            return rest[2], rest[3:]
    if first in ("python", "torchrun") and rest[0] in FILES:
        return FILES[rest[0]], rest[1:]
    return None


def check(name: str, words: list[str]) -> None:
    """Read the words as the program does before it opens anything but configs; ValueError or SystemExit 2 where it
    would refuse them."""
    module = import_module(f"vqscale.programs.commands.{COMMANDS[name][0]}")
    if name == "train":
        _check_train(module, words)
    elif name == "study":
        asked = module.arguments(words)
        configuration.load(StudyConfig, asked.path, asked.changes)
    elif name == "claims":
        args = module.arguments(words)
        for path in args.files:
            configuration.load(ClaimsConfig, path, args.changes)
    elif name == "plan":
        args = module.arguments(words)
        if not args.check:
            module._run(args)
    elif name == "bench":
        if not words or words[0] not in module.subcommand("__main__").SUBCOMMANDS:
            raise SystemExit(module.main(words))
        module.subcommand(words[0]).arguments(words[1:])
    else:
        module.arguments(words)


def _check_train(module, words: list[str]) -> None:
    if "--help" in words:
        if status := module.main(words):
            raise SystemExit(status)
        return
    path, changes, _, _ = module._arguments(words)
    configuration.load(Run, path or "configs/quickstart/tokenizer.yaml", changes)
