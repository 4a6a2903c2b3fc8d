"""Whole runs for tests: tiny shards and a tiny config, launch/train.py on n processes, and what a run folder holds.

`start` runs launch/train.py's `main` in processes that forks.py forks, with torchrun's environment and its manners:
when one fails, the others are killed.
`torchrun` is the real command, for what only it can show. What differs between two starts of one run (times) is left
out by `rows`; `tensors` puts the rows of a checkpoint together, whatever number of processes wrote it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import itertools
import json
import multiprocessing as mp
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import forks
import torch
import yaml
from PIL import Image

from vqscale.data.made import shapes
from vqscale.disk import checkpoint
from vqscale.disk.writer import Writer
from vqscale.programs.soak.compare import rows, tensors
from vqscale.run import folder as run_folder

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ROOT / "launch" / "train.py"
STOPPED = run_folder.EXIT_STOPPED
NUM_TRAIN, NUM_VAL, SIDE = 24, 10, 16  # a training epoch is three batches


def write_shards(folder: Path) -> Path:
    """train-0.tar, train-1.tar and val.tar of drawn pictures; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    half = NUM_TRAIN // 2
    for name, first, last in (("train-0", 0, half), ("train-1", half, 2 * half), ("val", 100, 100 + NUM_VAL)):
        with tarfile.open(folder / f"{name}.tar", "w") as tar:
            for index in range(first, last):
                pixels, label = shapes.draw(index, SIDE, 0)
                png = io.BytesIO()
                Image.fromarray(pixels).save(png, "PNG")
                for suffix, content in (("png", png.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{index:05d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def write_config(folder: Path, shards: Path, *overrides: str) -> Path:
    """FOLDER/run.yaml of a run in FOLDER/run, in which everything that has state is at work; returns its path.

    K does not divide by the processes; adam's eps keeps it from blowing up the rounding of gradients near zero.
    """
    images = {"image_size": SIDE, "num_workers": 0, "index_dir": str(shards / "index")}
    config = {
        "task": "tokenizer",
        "run": {"folder": str(folder / "run"), "steps": 8, "log_every": 1, "eval_every": 4, "eval_images": 8}
        | {"checkpoint_every": 2, "keep": 10, "seed": 3, "device": "cpu"},
        "data": {
            "batch": 8,
            "train": {"shards": str(shards / "train-{0..1}.tar"), "window_shards": 2, "flip": True, **images},
            "val": {"shards": str(shards / "val.tar"), **images},
        },
        "tokenizer": {
            "latent_norm": "rms",
            "net": {"channels": 8, "patch": 2, "multipliers": [1, 1], "num_blocks": 1, "z_channels": 8}
            | {"attention_levels": [], "mid_attention": False, "num_groups": 4},
            "quantizer": {"name": "ibq", "num_codes": 101, "dim": 8, "similarity": "euclid", "entropy_weight": 0.1}
            | {"entropy_temperature": 0.5}
            | {"warmup_steps": 2, "revive_every": 2, "revive_after": 1, "revive_below": 0.5, "revive_most": 16},
        },
        "loss": {"reconstruction": "l2"},
        "optim": {"lr": 1e-3, "warmup_steps": 2, "eps": 1e-4},
        "engine": {"name": "torch", "timeout_s": 60},
    }
    return write(config, folder, *overrides)


def write(config, folder, *overrides):
    """Put a config with key=value overrides into folder/run.yaml; returns the file."""
    config = copy.deepcopy(config)  # parts of it are others' too
    for text in overrides:
        key, _, value = text.partition("=")
        *above, last = key.split(".")
        place = config
        for name in above:
            place = place.setdefault(name, {})
        place[last] = yaml.safe_load(value)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


class Job:
    """launch/train.py on `world` processes of this machine. `before(rank)` is called in each of them first."""

    def __init__(self, folder: Path, argv: list[str], world: int, before: Callable[[int], None] | None, env: dict):
        self.log = folder / "log.txt"
        self.log.write_text("")
        shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": str(forks.free_port())}
        self.processes = [
            forks.context.Process(target=_rank, args=(rank, shared | env, argv, self.log, before))
            for rank in range(world)
        ]
        for process in self.processes:
            process.start()

    def signal(self, number: int) -> None:
        for process in self.processes:
            os.kill(process.pid, number)

    def wait(self, timeout_s: float = 60.0) -> list[int]:
        """The exit codes, -9 for what was killed; once a process has failed the others are given two seconds."""
        codes = forks.join(self.processes, timeout_s)
        assert codes is not None, f"a rank did not end within {timeout_s} s:\n{self.output}"
        return codes

    @property
    def output(self) -> str:
        return self.log.read_text()


def _rank(rank: int, shared: dict, argv: list[str], log: Path, before: Callable[[int], None] | None) -> None:
    """One process of a job: what `torchrun launch/train.py ARGV` would start."""
    os.environ.update(shared, RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    forks.write_to(log, log)
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # as in a process of its own; here it would be that of the server
    if before is not None:
        before(rank)
    sys.exit(_launch().main(argv))


def _launch():
    spec = importlib.util.spec_from_file_location("launch_train", LAUNCH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(path: Path, *overrides: str, world: int = 1, before: Callable[[int], None] | None = None, **env: str) -> Job:
    return Job(path.parent, [str(path), *overrides], world, before, env)


def finish(path: Path, *overrides: str, world: int = 1, **more) -> Path:
    """A run to its end, which must be a good one; returns the run folder."""
    assert (job := start(path, *overrides, world=world, **more)).wait() == [0] * world, job.output
    return path.parent / "run"


def stopped(folder: Path, shards: Path) -> Path:
    """The config of a run on one process that was stopped after step 5; it has checkpoints of 2, 4 and 5."""
    path = write_config(folder, shards)
    stop = partial(at_call, "vqscale.engine.engine:Engine.backward", 5, partial(hear, signal.SIGTERM), 0)
    assert start(path, before=stop).wait() == [STOPPED]
    assert steps_saved(folder / "run") == [2, 4, 5]
    return path


def torchrun(num: int, path: Path, *overrides: str) -> subprocess.Popen:
    """The command of the README, in a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num}"]
    return subprocess.Popen(
        [*command, str(LAUNCH), str(path), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def descendants(pid: int) -> list[int]:
    """Every process that a process has started, directly or not, and that is still there."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [number for child in map(int, children) for number in (child, *descendants(child))]


def alive(pids: list[int]) -> list[int]:
    """Those of the processes that still run; what is dead and waits for its parent does not."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def at_call(target: str, number: int, action: Callable[[], None], on_rank: int, rank: int) -> None:
    """Do something on one rank before the given call (counted from 1) of module:attribute; for `before` of a job."""
    module, _, path = target.partition(":")
    *above, name = path.split(".")
    owner = importlib.import_module(module)
    for part in above:
        owner = getattr(owner, part)
    original, calls = getattr(owner, name), itertools.count(1)

    def counted(*args, **kwargs):
        if rank == on_rank and next(calls) == number:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, counted)


def saved_at_once(before: Callable[[int], None] | None, rank: int) -> None:
    """For `before`, another one in it: a step that saves goes on when that is on the disk, so what stands is known."""
    save = Writer.save

    def save_and_wait(self, *args):
        save(self, *args)
        self.wait()

    Writer.save = save_and_wait
    if before is not None:
        before(rank)


def hear(number: int) -> None:
    """Get a signal; with SIGKILL, as when a machine is switched off."""
    os.kill(os.getpid(), number)


def wait_for(there: Callable[[], object], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not there():
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.002)


def contents(folder: Path) -> dict[Path, tuple[int, bytes]]:
    """When every file was written, and what is in it."""
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def steps_saved(run: Path) -> list[int]:
    """Steps of the checkpoints that stand; one that is being written, or was when its rank died, does not."""
    return [int(path.name) for path in checkpoint.finished(run / "checkpoints")]


def same_bits(run: Path, other: Path, step: int) -> None:
    """Two runs have logged the same numbers and hold the same tensors, to the bit."""
    for mine, theirs in zip(rows(run), rows(other), strict=True):
        assert mine == theirs
    ours, others = tensors(run, step), tensors(other, step)
    assert ours.keys() == others.keys()
    for name, x in ours.items():
        assert torch.equal(x, others[name]), name
    facts = [
        json.loads((folder / "checkpoints" / f"{step:010d}" / "facts.json").read_text()) for folder in (run, other)
    ]
    assert facts[0] == facts[1]


def same_numbers(run: Path, other: Path) -> None:
    """Two runs have logged the same numbers to 1e-5, up to the order in which sums were added up."""
    for mine, theirs in zip(rows(run), rows(other), strict=True):
        assert mine.keys() == theirs.keys()
        for key, x in mine.items():
            size = 10.0 if key == "val/ssim" else max(abs(x), 1e-3)  # of 8-bit images: a pixel may round the other way
            assert abs(x - theirs[key]) <= 1e-5 * size, f"step {mine['step']} {key}: {x} and {theirs[key]}"
