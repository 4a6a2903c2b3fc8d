"""Where the repository is that this package was imported from: its configs, its commit, its programs. Nowhere for a
wheel."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO


def checkout() -> Path | None:
    """The root of the checkout; None where the package is installed without one."""
    above = Path(__file__).resolve().parents[2]
    try:
        ours = 'name = "vqscale"' in (above / "pyproject.toml").read_text().splitlines()
    except (OSError, ValueError):
        return None
    return above if ours and (above / "configs").is_dir() else None


def config(name: str) -> Path:
    """A config of the checkout, for a program that was given none; ValueError where there is no checkout."""
    root = checkout()
    if root is None:
        raise ValueError(
            f"no CONFIG was given, and configs/{name}, which is taken then, is in the repository and not in the "
            "installed package: give the path of a CONFIG"
        )
    return root / "configs" / name


FILES = {"train": "launch/train", "shards": "tools/make_shards"}  # others are called as their program


def program(name: str) -> list[str]:
    """What python is given to start a program: its file of the checkout, or else a name of the installed package."""
    root = checkout()
    return ["-m", "vqscale", name] if root is None else [str(root / f"{FILES.get(name, f'tools/{name}')}.py")]


def command(name: str, words: Iterable[str]) -> str:
    """The command that a file tells: `vqscale NAME` is the same program however it was started."""
    return shlex.join(["vqscale", name, *words])


def started(name: str, processes: int) -> list[str]:
    """The same on several processes of this machine, of which nothing listens to the network."""
    return [*(["-m", "vqscale.parallel.local", str(processes)] if processes > 1 else []), *program(name)]


def begin(words: Iterable[str], log: IO[str], env: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Python with these words, in a group of its own, for Ctrl-C is for this process, which tells it; what it prints
    goes to the log."""
    return subprocess.Popen([sys.executable, *words], stdout=log, stderr=subprocess.STDOUT, env=env, process_group=0)
