"""What tests share: one thread, fixed seeds, `ranks` (a function on n gloo processes), no group left behind."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
import torch.distributed as dist
from begun import in_a_begun_process

from vqscale.parallel.spawn import run
from vqscale.run.folder import STOP_SIGNALS

TOOLS = Path(__file__).resolve().parents[1] / "tools"

torch.set_num_threads(1)
if not torch.cuda.is_available():  # before anything imports triton, whatever the order of the files (interpreted.py)
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _clean():
    torch.manual_seed(0)
    _hear_signals()
    yield
    _hear_signals()
    assert not dist.is_initialized(), "a test left a process group behind"


def _hear_signals():
    """As in a process that has just begun, and as those that a test starts are to find them: see processes.joined."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def ranks():
    """ranks(n, function, *args) runs the function on n gloo processes and returns the results in rank order."""
    return lambda n, function, *args, timeout_s=60.0: run(in_a_begun_process, n, function, *args, timeout_s=timeout_s)


@pytest.fixture
def tool(monkeypatch):
    """tool(name) is a module of tools/bench/."""
    monkeypatch.syspath_prepend(str(TOOLS))
    return lambda name: importlib.import_module(f"bench.{name}")


@pytest.fixture(scope="session")
def tiny_shards(tmp_path_factory):
    """A folder with train-0.tar, train-1.tar and val.tar of a few drawn pictures. Not to be changed."""
    from jobs import write_shards

    return write_shards(tmp_path_factory.mktemp("shards"))


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
