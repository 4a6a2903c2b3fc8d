"""Processes for tests, forked from a server that has imported torch already: one starts in a fraction of a second.

`program` runs a Python program as a command line does, for tests of what programs say and write; that they start on
their own (imports, the environment) is shown by few tests, by subprocess. jobs.py starts trainings.
"""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import random
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
context = mp.get_context("forkserver")
context.set_forkserver_preload(  # one server for the pool of parallel/spawn.py, too
    [
        "vqscale.parallel.spawn",
        "vqscale.train.tokenizer",
        "vqscale.train.prior",
        "vqscale.plan.tokenizer",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "matplotlib.figure",
        "matplotlib.backends.backend_agg",
        "pytest",
        *([] if torch.cuda.is_available() else ["deepspeed"]),  # it takes the accelerator that it finds, for good
    ]
)


def write_to(out: Path, err: Path) -> None:
    """From now on, this process and those that it starts print into these files."""
    for stream, name, number in ((sys.stdout, out, 1), (sys.stderr, err, 2)):
        stream.flush()
        handle = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout.reconfigure(line_buffering=True)


def program(
    *words: object, world: int = 1, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout_s: float = 300.0
) -> subprocess.CompletedProcess[str]:
    """`python WORDS` (a file, a folder, or -m and a module, then arguments) as subprocess.run would return it, or what
    `torchrun --nproc_per_node=WORLD WORDS` would start: when one process fails, the others are killed.
    """
    argv, env = [str(word) for word in words], dict(os.environ if env is None else env)
    if world > 1:
        env |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": str(free_port())}
    with tempfile.TemporaryDirectory() as folder:
        out, err = (Path(folder, name) for name in ("out", "err"))
        ranks = [
            context.Process(target=_program, args=(argv, cwd, env, world, rank, out, err)) for rank in range(world)
        ]
        for rank in ranks:
            rank.start()
        codes = join(ranks, timeout_s)
        told = [path.read_text() if path.exists() else "" for path in (out, err)]
        assert codes is not None, f"{argv} did not end within {timeout_s} s:\n{told[0]}\n{told[1]}"
    return subprocess.CompletedProcess(argv, next((code for code in codes if code), 0), *told)


def join(processes: Sequence[mp.process.BaseProcess], timeout_s: float) -> list[int] | None:
    """The exit codes, -9 for what was killed; once one has failed the others are given two seconds. None: too late."""
    deadline, failed = time.monotonic() + timeout_s, False
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if not failed and any(process.exitcode for process in processes):
            deadline, failed = time.monotonic() + 2.0, True
        time.sleep(0.01)
    late = [process for process in processes if process.is_alive()]
    for process in late:
        process.kill()
    for process in processes:
        process.join()
    return None if late and not failed else [process.exitcode for process in processes]


def free_port() -> int:
    """A port that is free, and that no connection of another test takes before it is used: below those that a system
    gives to connections."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.socket() as free:
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("of 100 ports between 20,000 and 32,000 none is free")


def _program(argv: list[str], cwd: Path, env: Mapping[str, str], world: int, rank: int, out: Path, err: Path) -> None:
    write_to(out, err)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", torch.get_num_threads())))
    # As in a process of its own: its start method, the server that it may start itself, the path of imports.
    mp.set_start_method("fork", force=True)
    context.set_forkserver_preload(["vqscale.parallel.spawn"])
    sys.path[:] = [path for path in sys.path if not path.startswith(str(ROOT / "tests"))]
    if argv[0] == "-m":
        sys.argv = argv[1:]
        sys.path.insert(0, str(cwd))
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).resolve().parent))
        runpy.run_path(argv[0], run_name="__main__")
