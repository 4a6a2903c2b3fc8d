"""Processes of one machine, and what of them listens to whom."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LISTENS = "0A"  # TCP_LISTEN in /proc/net/tcp
# Meets, makes all groups, sends on them, and says what the processes of its launcher listen on.
PROGRAM = """
import json, os, sys
from pathlib import Path
import torch
from vqscale.parallel import ops
from vqscale.parallel.mesh import Mesh, connect, disconnect

sys.path[:0] = [TESTS]
from test_local import listening

connect("cpu", 60.0)
mesh = Mesh(data=2, codes=2)
total = float(ops.sum_over(ops.sum_over(torch.tensor(float(os.environ["RANK"])), mesh.codes), mesh.data))
found = listening(os.getppid())
gathered = ops.gather_objects(found, mesh.world)  # none leaves before all have looked
if mesh.world.rank == 0:
    print(json.dumps([total, os.environ["MASTER_ADDR"], sorted({each for part in gathered for each in part})]))
if sys.argv[1:] == ["fail"] and mesh.world.rank == 1:
    os._exit(3)
disconnect()
"""


def listening(launcher: int) -> list[str]:
    """The addresses, as /proc has them, on which a process and those that it started listen."""
    mine, tree = {}, {launcher}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            mine[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    while more := {pid for pid, parent in mine.items() if parent in tree} - tree:
        tree |= more
    sockets = set()
    for pid in tree:
        for handle in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                sockets.add(os.readlink(handle))
            except OSError:
                continue
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == LISTENS and f"socket:[{rest[5]}]" in sockets:
                found.append(local.rpartition(":")[0])
    return found


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    (folder / "program.py").write_text(PROGRAM.replace("TESTS", repr(str(ROOT / "tests"))))
    clean = {name: x for name, x in os.environ.items() if not name.startswith(("MASTER_", "TORCHELASTIC_"))}
    return subprocess.Popen(
        [sys.executable, "-m", "vqscale.parallel.local", "4", str(folder / "program.py"), *words],
        cwd=ROOT,
        env={**clean, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="no /proc, which says who listens")
def test_nothing_of_processes_of_one_machine_listens_to_the_network(tmp_path):
    process = start(tmp_path, "fail")
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.send_signal(signal.SIGTERM)
    total, address, found = json.loads(out)
    assert (total, address) == (6.0, "127.0.0.1")
    assert found == ["0100007F"], err  # of tcp; one of tcp6 would be longer
    assert process.returncode == 1, err
    assert "exitcode  : 3" in err
    assert not list(tmp_path.glob("vqscale-*"))


@pytest.mark.parametrize("words", [[], ["2"], ["many", "a.py"], ["-1", "a.py"]])
def test_a_start_of_nothing_is_refused(words):
    from vqscale.parallel import local

    with pytest.raises(SystemExit, match="give a number of processes, and a program"):
        local.main(words)
