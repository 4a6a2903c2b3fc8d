"""What a cluster does to a run, done to one on a real SLURM, see tests/drills.sh. One run on two nodes goes through it.

Each drill disturbs the run and waits until it does new steps; where the job has failed it is submitted again, as its
user would. A drill holds when no more is lost than it says beforehand; and in the end every step has to be, in every
bit of what was logged, that of a run to which nothing happened. A drill that does not hold stays in the table.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import drilled
import jobs
import netns
import slurm
from drilled import Drill, Line, Skipped, logged, told, undisturbed

from vqscale.programs.soak.disk import Disk, mounted
from vqscale.programs.soak.training import last_step

NODES, EVERY, MANY = 3, 20, 1_000_000
GOES_ON = re.compile(r"going on after step (\d+) of \S+ on (\d+) processes")
CLOSE = 1e-2  # of the numbers of the first steps on another number of processes, beside the undisturbed ones
FEW = 5


class Ground:
    """A cluster, the run, and the job that does it."""

    def __init__(self, place: Path, environment: dict[str, str], hosts: netns.Hosts | None, disk: Disk, shards: Path):
        self.place, self.environment, self.hosts, self.disk = place, environment, hosts, disk
        changes = [f"run.steps={MANY}", f"run.eval_every={MANY}", f"run.checkpoint_every={EVERY}", "run.keep=2"]
        changes += [f"run.folder={disk.folder / 'run'}", "mesh.codes=1", "engine.timeout_s=20"]
        changes += ["optim.schedule=constant"]  # which does not know how many steps there will be
        self.config = jobs.write_config(place, shards, *changes)
        self.run, self.log, self.job, self.seen = disk.folder / "run", place / "log.txt", "", 0
        self.steady = 0
        """the last step that was done on two processes"""

    def submit(self, *options: str, nodes: int = 2) -> None:
        self.job = self.submit_beside(self.log, *options, f"--nodes={nodes}")

    def submit_beside(self, log: Path, *options: str) -> str:
        words = ["--time=60", "--signal=B:USR1@60", *options, str(slurm.TRAIN), str(self.config)]
        return slurm.submit(self.environment | {"VQSCALE_PROCESSES": "1"}, self.place, log, *words)

    def ask(self, *words: str) -> str:
        return slurm.ask(self.environment, *words)

    def shown(self, key: str, kind: str = "job", name: str = "") -> str:
        found = re.search(rf"\b{key}=(\S*)", self.ask("scontrol", "show", kind, name or self.job))
        return found[1] if found else ""

    def nodes(self) -> list[str]:
        """Of the job."""
        return self.ask("scontrol", "show", "hostnames", self.shown("NodeList")).split()

    def new(self) -> str:
        """What the job has printed since the drill began."""
        return self.log.read_text(errors="replace")[self.seen :] if self.log.exists() else ""

    def until(self, there: Callable[[], object], what: str, seconds: float = 400.0) -> None:
        deadline = time.monotonic() + seconds
        while not there():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{what}: not within {seconds:.0f} s; the job is {self.shown('JobState')}")
            time.sleep(0.05)

    def ended(self, seconds: float = 400.0) -> str:
        """The state that the job ended in, or came back to the queue with."""
        over = ("FAILED", "CANCELLED", "COMPLETED", "TIMEOUT", "NODE_FAIL", "PENDING", "PREEMPTED")
        self.until(lambda: self.shown("JobState") in over, "the end of the job", seconds)
        return self.shown("JobState")

    def submit_again(self) -> None:
        """Whatever has become of the job."""
        self.ask("scancel", self.job)
        self.until(lambda: not self.ask("squeue", "-h", "-j", self.job), "an empty queue")
        self.seen = len(self.log.read_text(errors="replace"))
        self.submit()
        self.lost()

    def lost(self, reached: int = 0) -> int:
        """Wait until the run does new steps; how many it does again."""
        reached = max(reached, last_step(self.run))

        def resumed() -> re.Match[str] | None:
            nonlocal reached
            if not (found := GOES_ON.search(self.new())):
                reached = max(reached, last_step(self.run))
            return found

        self.until(resumed, "going on")
        found = GOES_ON.search(self.new())
        assert found is not None
        after = int(found[1])
        self.until(lambda: last_step(self.run) > max(after, reached) + FEW, "new steps")
        return reached - after


def _two_nodes(ground: Ground) -> tuple[str, int]:
    ground.submit()
    ground.until(lambda: last_step(ground.run) > FEW, "the first steps", 600.0)
    assert len(ground.nodes()) == 2
    assert "on 2 processes" in ground.new(), ground.new()
    return f"a process on each of {', '.join(ground.nodes())}", 0


def _requeue(ground: Ground) -> tuple[str, int]:
    ground.ask("scontrol", "requeue", ground.job)
    return "saves, goes on by itself", ground.lost()


def _preemption(ground: Ground) -> tuple[str, int]:
    options = ["--partition=high", "--exclusive", f"--nodes={NODES}", f"--output={ground.place / 'urgent.txt'}"]
    urgent = slurm.submit(ground.environment, ground.place, ground.place / "urgent.txt", *options, "--wrap=sleep 3")
    ground.until(lambda: "requeue" in ground.new(), "requeueing")
    lost = ground.lost()
    assert ground.shown("JobState", name=urgent) == "COMPLETED"
    return "saves, gives way, goes on by itself", lost


def _node_down(ground: Ground) -> tuple[str, int]:
    name = ground.nodes()[1]
    if ground.hosts is not None:
        ground.hosts.switch_off(name)
    ground.ask(
        "scontrol", "update", f"nodename={name}", "state=down", "reason=drill"
    )  # as SLURM does after some minutes
    lost = ground.lost()
    others = ", ".join(ground.nodes())
    if ground.hosts is not None:
        slurm.start_node(ground.environment, name, ground.hosts)
    ground.until(lambda: "down" not in ground.ask("sinfo", "-h", "-n", name, "-o", "%T"), "that the node is back")
    off = "is switched off" if ground.hosts is not None else "is marked as down"
    return f"{name} {off}, SLURM requeues, it goes on by itself on {others}", lost


def _killed_rank(ground: Ground) -> tuple[str, int]:
    os.kill(_rank(ground, 1), signal.SIGKILL)
    assert (state := ground.ended()) == "FAILED", state
    assert "lost another rank" in ground.new(), ground.new()
    ground.submit()
    return "the others say so, the job fails; submitted again it goes on", ground.lost()


def _rank(ground: Ground, number: int) -> int:
    """The process of a rank of the job."""
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            words = (entry / "cmdline").read_bytes() if entry.name.isdecimal() else b""
            known = (entry / "environ").read_bytes().split(b"\0") if b"launch/slurm/rank.py" in words else []
            if {f"SLURM_JOB_ID={ground.job}".encode(), f"RANK={number}".encode()} <= set(known):
                return int(entry.name)
    raise AssertionError(f"job {ground.job} has no rank {number}")


def _full_disk(ground: Ground) -> tuple[str, int]:
    if ground.disk.lacking:
        raise Skipped(ground.disk.lacking)
    ground.disk.fill()
    state = ground.ended()
    reached = last_step(ground.run)
    ground.disk.empty()
    assert state == "FAILED", state
    assert "No space left on device" in ground.new()
    ground.submit()
    return "says what to do, the job fails; with room and submitted again it goes on", ground.lost(reached)


def _cut_wire(ground: Ground) -> tuple[str, int]:
    if ground.hosts is None:
        raise Skipped("no network namespaces here")
    name = ground.nodes()[1]
    ground.hosts.cut(name)
    try:
        ground.until(lambda: "lost another rank" in ground.new(), "that the other rank is missed")
    finally:
        ground.hosts.mend(name)
    state = ground.ended()
    ground.until(lambda: "idle" in ground.ask("sinfo", "-h", "-n", name, "-o", "%T"), "that the node is back")
    if state == "FAILED":
        ground.submit()
    return f"{name} is missed after engine.timeout_s, the job ends ({state}); submitted again it goes on", ground.lost()


def _time_limit(ground: Ground) -> tuple[str, int]:
    hours, minutes, _ = ground.shown("RunTime").split(":")
    limit = 60 * int(hours) + int(minutes) + 2
    ground.ask("scontrol", "update", f"jobid={ground.job}", f"timelimit={limit}")
    ground.until(lambda: "requeue" in ground.new(), "requeueing")
    ground.ask("scontrol", "update", f"jobid={ground.job}", "timelimit=60")  # of its next start, or it is asked again
    assert "USR1: asking it to save and leave" in ground.new(), ground.new()
    return "saves before its time is up, goes on by itself", ground.lost()


def _two_jobs(ground: Ground) -> tuple[str, int]:
    log, before = ground.place / "second.txt", last_step(ground.run)
    second = ground.submit_beside(log, "--nodes=1")
    try:
        ground.until(lambda: ground.shown("JobState", name=second) == "FAILED", "that the second is refused")
    finally:
        ground.ask("scancel", second)
    said = log.read_text()
    assert "error: " in said, said
    ground.until(lambda: last_step(ground.run) > before + FEW, "new steps of the first")
    assert not GOES_ON.search(ground.new())
    return "the second is refused and told by whom; the first knows nothing of it", 0


def _cancel(ground: Ground) -> tuple[str, int]:
    ground.ask("scancel", ground.job)
    assert (state := ground.ended()) == "CANCELLED", state
    assert "not requeued: the job is being cancelled" in ground.new(), ground.new()
    ground.steady = last_step(ground.run)
    return "saves and stays away", 0


def _other_nodes(ground: Ground) -> tuple[str, int]:
    ground.submit(nodes=1)
    lost = ground.lost()
    assert "on 1 processes" in ground.new()
    ground.ask("scancel", ground.job)
    ground.ended()
    return f"from two nodes to one; its next {FEW} steps agree to {CLOSE}", lost


def _array(ground: Ground) -> tuple[str, int]:
    dial = {"name": "steps", "key": "run.steps", "values": [2, 3, 4]}
    study = {"base": str(ground.config), "folder": str(ground.place / "study"), "dials": [dial]}
    (ground.place / "study.yaml").write_text(json.dumps(study))
    command = [sys.executable, "tools/study.py", str(ground.place / "study.yaml"), "--slurm", "--time=10"]
    options = {"cwd": ground.place / "checkout", "env": ground.environment, "timeout": 600.0}
    said = subprocess.run(command, capture_output=True, text=True, **options)
    assert "an array of 3 runs" in said.stdout, said.stdout + said.stderr
    folders = [ground.place / "study" / "runs" / f"{n}-seed0" for n in (2, 3, 4)]
    ground.until(lambda: all((folder / "summary.json").exists() for folder in folders), "three runs", 600.0)
    return "three runs, each a task, all done", 0


DRILLS = (
    Drill("two nodes", _two_nodes, 0),
    Drill("requeue", _requeue, 0),
    Drill("preemption", _preemption, 0),
    Drill("a node goes down", _node_down, EVERY + FEW),
    Drill("a killed rank", _killed_rank, EVERY + FEW),
    Drill("a full disk", _full_disk, EVERY + FEW),
    Drill("a cut wire", _cut_wire, EVERY + FEW),
    Drill("time limit", _time_limit, 0),
    Drill("two jobs on one run folder", _two_jobs, 0),
    Drill("cancel", _cancel, 0),
    Drill("another number of nodes", _other_nodes, 0),
    Drill("an array of a study", _array, 0),
)


def run(place: Path, out: Path) -> bool:
    """Do all drills, write the table; whether all that were not skipped held."""
    shards = jobs.write_shards(place / "shards")
    lines = []
    with _hosts() as hosts, mounted(place / "disk", 64 << 20) as disk:
        wires = {"GLOO_SOCKET_IFNAME": "eth0"} if hosts else {}  # names of these hosts do not resolve
        with slurm.cluster(place / "slurm", NODES, hosts) as environment:
            ground = Ground(place, environment | wires, hosts, disk, shards)
            for drill in DRILLS:
                lines.append(_line(ground, drill))
                print(told(lines[-1]), flush=True)
        lines.append(_same(ground))
        print(told(lines[-1]), flush=True)
    nodes = f"{NODES} hosts with wires of their own" if hosts else f"{NODES} daemons on one host"
    drilled.write(out, "drills", "bash tests/drills.sh", lines, nodes=nodes)
    return all(line["held"] is not False for line in lines)


@contextlib.contextmanager
def _hosts() -> Iterator[netns.Hosts | None]:
    with contextlib.ExitStack() as stack:
        try:
            found = stack.enter_context(netns.hosts(NODES))
        except OSError as error:
            print(f"nodes share one host, and no wire is cut: {error}", flush=True)
            found = None
        yield found


def _line(ground: Ground, drill: Drill[Ground]) -> Line:
    """Do one drill; where something else came of it the run is submitted again, for the next one."""
    ground.seen = len(ground.log.read_text(errors="replace")) if ground.log.exists() else 0
    return drilled.line(ground, drill, ground.submit_again)


def _same(ground: Ground) -> Line:
    """The run to which nothing happened, as long as the other, and whether they are one."""
    theirs = logged(ground.run)
    mine = undisturbed(ground.config, ground.place / "undisturbed", theirs[-1]["step"])
    pairs = list(zip(mine, theirs, strict=False))
    steady = [(one, two) for one, two in pairs if one["step"] <= ground.steady]
    after = [(one["loss"], two["loss"]) for one, two in pairs if 0 < one["step"] - ground.steady <= FEW]
    other = [one["step"] for one, two in steady if one != two]
    close = len(after) == FEW and all(abs(one - two) <= CLOSE * abs(one) for one, two in after)
    same = not other and len(mine) == len(theirs) and len(steady) == ground.steady
    happens = f"{len(steady)} steps on two nodes, beside as many of a run on two processes that nothing happened to"
    outcome = "every number that was logged is equal in every bit" if same else f"NOT the same at step {other[:1]}"
    outcome += "" if close else f"; NOT close on one process: {after}"
    return {"drill": "all of them together", "happens": happens, "lost": 0, "held": same and close, "outcome": outcome}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # no daemon, wire or disk stays
        signal.signal(number, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="vqscale-drills-") as folder:
        sys.exit(0 if run(Path(folder), asked.out) else 1)
