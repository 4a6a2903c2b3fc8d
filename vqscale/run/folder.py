"""The run folder explains itself: what was asked for, by which code, with which versions. And requests to stop.

run.yaml         the resolved config, itself a valid config
code/            commit, diff, versions.json, the command, the submit script under SLURM
metrics.jsonl    one JSON object per logged step        tb/  TensorBoard        samples/  pictures
checkpoints/     NNNNNNNNNN/ per saved step             summary.json  when the run is done
tokens.json      of a prior: which cache, and whose ids         init.json     weights that it began from, if any
.writer          while a process writes here: which (disk/owner.py)
STOP             made by hand: the run saves and leaves at the next step
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from vqscale import config as configuration
from vqscale.config.text import data_of
from vqscale.disk import files
from vqscale.errors import ExplainedError
from vqscale.run.checkout import checkout

if TYPE_CHECKING:
    from vqscale.parallel.mesh import Mesh


class RunError(ExplainedError):
    """A run cannot go on, for a reason that its message explains by itself."""


STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
EXIT_STOPPED = 75  # EX_TEMPFAIL: saved on request, run me again
CODE = ("vqscale", "launch", "tools", "configs", "pyproject.toml")  # what a run follows from, in a checkout
PACKAGES = ("vqscale", "torch", "deepspeed", "webdataset", "zarr", "numpy", "pillow", "tensorboard")


def check(config: Any) -> None:
    """ValueError when the folder holds a run of another config, or cannot be one; nothing is written. Safe on every
    rank."""
    old = Path(config.run.folder) / "run.yaml"
    above = next(path for path in (old.parent, *old.absolute().parents) if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(
            f"run.folder {config.run.folder} cannot be written: {above} is "
            f"{'not writable by this user' if above.is_dir() else 'no folder'}; choose another run.folder"
        )
    if not old.exists():
        return
    try:
        before = dict(data_of(old))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{old}, the config of the run in {config.run.folder}, cannot be read ({error}): put it back, or remove it "
            "if you are sure that this is the same run"
        ) from None
    with contextlib.suppress(configuration.ConfigError):
        # A key that came into being after the run began had its default, or what stood for it (config.Before).
        before = configuration.to_dict(configuration.parse(type(config), before, written=True))
    free = list(configuration.free_keys(type(config)))
    lines = configuration.differences(before, configuration.to_dict(config), free)
    if lines:
        raise ValueError(
            f"the run in {config.run.folder} has another config ({old}), and would not be the same run:\n  "
            + "\n  ".join(lines)
            + "\nchange run.folder to begin a new run, or set these keys back to continue the old one"
        )


def prepare(config: Any, command: list[str], mesh: Mesh) -> list[str]:
    """Rank 0 writes the config and the code's identity into the folder. Returns what to say of changed versions."""
    if mesh.world.rank:
        return []
    folder = Path(config.run.folder)
    code = folder / "code"
    code.mkdir(parents=True, exist_ok=True)
    files.write(folder / "run.yaml", configuration.dump(config))
    files.write(code / "command.txt", " ".join(command) + "\n")
    commit, diff = _git()
    files.write(code / "commit.txt", commit + "\n")
    files.write(code / "diff.patch", diff)
    script = os.environ.get("VQSCALE_SUBMIT_SCRIPT")
    if script and Path(script).exists():
        files.write(code / "submit.sbatch", Path(script).read_bytes())
    new = versions()
    path = code / "versions.json"
    old = json.loads(path.read_text()) if path.exists() else new
    files.write_json(path, new)
    changed = [name for name in new if old.get(name) != new[name]]
    return [f"warning: {name} was {old.get(name)} when this run began, and is {new[name]} now" for name in changed]


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def commit() -> str:
    """The commit of the code that runs, with a plus sign when files differ from it; "unknown" outside a checkout."""
    name, diff = _git()
    return name + ("+" if diff else "")


def _git() -> tuple[str, str]:
    root = checkout()
    if root is None:
        return "unknown", ""

    def ask(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        return done.stdout

    try:
        if Path(ask("rev-parse", "--show-toplevel").rstrip("\n")).resolve() != root:
            return "unknown", ""  # a repository of somebody else, in which this code lies
        return ask("rev-parse", "HEAD").strip(), ask("diff", "HEAD", "--", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return "unknown", ""


def read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write_note(folder: Path, name: str, facts: Mapping[str, Any], mesh: Mesh) -> None:
    """Rank 0 writes FOLDER/NAME in one step: what the run found, for those who read the folder."""
    if mesh.world.rank == 0:
        files.write_json(folder / name, facts)


def write_summary(folder: Path, summary: dict[str, Any], mesh: Mesh) -> None:
    """Rank 0 writes summary.json, in one step: whoever reads it sees the old one or the new one."""
    if mesh.world.rank == 0:
        files.write_json(folder / "summary.json", {**summary, "commit": commit()})


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """What listens to STOP_SIGNALS inside the block, a StopRequest say, hears nothing after it: the handlers of before
    are back. Also a decorator of a function that makes one.
    """
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def ignore_stop_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopRequest:
    """Whether this process was asked to stop, by a signal or by a file STOP in the run folder.

    A signal sets a flag and nothing else; the loop looks at a step boundary, where all ranks can agree. Whoever makes
    one is inside of own_signals().
    """

    def __init__(self, folder: str | Path, mesh: Mesh) -> None:
        self.file = Path(folder) / "STOP"
        self.rank = mesh.world.rank
        self.reason = ""
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = signal.Signals(number).name

    def here(self) -> bool:
        if not self.reason and self.rank == 0 and self.file.exists():
            self.reason = "the file STOP"
        return bool(self.reason)

    def clear(self) -> None:
        """Remove the file, so that the next start goes on."""
        if self.rank == 0:
            self.file.unlink(missing_ok=True)
