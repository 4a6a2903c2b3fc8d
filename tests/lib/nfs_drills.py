"""What a network disk and its hosts do to a folder's one writer and to a run, done on a real NFS, see tests/nfs.sh.

First one run on two hosts, a process on each, goes through all of it: every step has to be, in every bit of what was
logged, that of a run to which nothing happened. Then the locks, on every version of NFS that is here.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import drilled
import jobs
import nfs
import saved_runs
import shard_files
from drilled import Drill, Line, logged, told, undisturbed
from nfs import MOUNT, Host, Remote, Server, until

from vqscale.data.tokens.stream import Cache
from vqscale.disk import checkpoint, owner
from vqscale.programs.soak.disk import Disk, mounted
from vqscale.programs.soak.training import GOES_ON, last_step

EVERY, MANY, FEW = 6, 1_000_000, 2
FAST = "owner.BEAT_S, owner.STALE_S = 1.0, 12.0"
HOLD = f"""
import sys
from vqscale.disk import owner
{FAST}
try:
    with owner.own(sys.argv[1], "the run"):
        print("mine", flush=True)
        sys.stdin.readline()
except ValueError as error:
    print(error, flush=True)
"""
LOOK = """
import os, sys
print(os.path.exists(sys.argv[1] + "/.writer"), flush=True)
"""
RACE = """
import contextlib, json, os, sys, time
from vqscale.disk import owner
owner.BEAT_S, owner.STALE_S = 0.2, 2.0
place, rounds, began, apart = sys.argv[1], *map(float, sys.argv[2:])
wrote = 0
for number in range(int(rounds)):
    time.sleep(max(0.0, began + apart * number - time.time()))
    folder = f"{place}/{number}"
    try:
        with owner.own(folder, "the run"):
            os.mkdir(folder + "/inside")  # fails where another one is
            time.sleep(0.05)
            os.rmdir(folder + "/inside")
            wrote += 1
    except ValueError:
        pass
print("wrote", wrote)
"""
# The answer to the first link is lost, as when a server restarts: another host makes it meanwhile, of the same file.
LOST = """
import os, sys
from vqscale.disk import owner
real = os.link
def link(made, path):
    print("link", made.name, flush=True)
    sys.stdin.readline()
    os.link = real
    real(made, path)
os.link = link
with owner.own(sys.argv[1], "the run"):
    print("mine")
"""


class Locks:
    """Two hosts and a folder for each drill."""

    def __init__(self, server: Server, hosts: list[Host], disk: Path) -> None:
        self.server, self.hosts, self.disk, self._count = server, hosts, disk, 0

    def folder(self) -> Path:
        """A new one, as hosts see it."""
        self._count += 1
        (self.disk / f"locks-{self._count}").mkdir()
        return MOUNT / f"locks-{self._count}"

    def hold(self, host: Host, folder: Path) -> Remote:
        return host.start(sys.executable, "-c", HOLD, folder)

    def holds(self, host: Host, folder: Path) -> Remote:
        held = self.hold(host, folder)
        held.hears("mine")
        return held

    def refuses(self, host: Host, folder: Path, holder: Remote, by: Host) -> None:
        """The host's start names who holds it, which goes on."""
        said = host.run(sys.executable, "-c", HOLD, folder)
        assert f"another process is writing the run in {folder}: process {holder.pid} of {by.name} since" in said, said
        assert holder.runs


def _at_once(ground: Locks) -> tuple[str, int]:
    return _race(ground, ground.folder(), 12, 1.0)


def _at_once_after_one_killed(ground: Locks) -> tuple[str, int]:
    folder = ground.folder()
    for number in range(4):
        (ground.disk / folder.name / str(number)).mkdir()
        (ground.disk / folder.name / str(number) / owner.NAME).write_text('{"pid": 7, "where": "gone", "host": "h9"}')
    return _race(ground, folder, 4, 6.0)


def _race(ground: Locks, folder: Path, rounds: int, apart: float) -> tuple[str, int]:
    words = [sys.executable, "-c", RACE, folder, rounds, time.time() + 4.0, apart]
    started = [host.start(*words) for host in ground.hosts for _ in range(3)]
    ends = [each.wait() for each in started]
    said = [each.said for each in started]
    assert not any(ends), said
    wrote = sum(int(each.split()[-1]) for each in said)
    assert wrote >= rounds, said
    return (
        f"3 processes on each of two hosts, {rounds} times: never two at a time, {wrote} wrote one after the other",
        0,
    )


def _alive(ground: Locks) -> tuple[str, int]:
    (first, second), folder = ground.hosts, ground.folder()
    assert "False" in second.run(sys.executable, "-c", LOOK, folder)  # which its kernel remembers
    holder = ground.holds(first, folder)
    ground.refuses(first, folder, holder, first)
    ground.refuses(second, folder, holder, first)
    assert holder.end() == 0
    assert ground.holds(second, folder).end() == 0
    return "it is refused on both hosts and told by whom; when that ended it is let in on the other at once", 0


def _clocks(ground: Locks) -> tuple[str, int]:
    second = ground.hosts[1]
    second.run("date", "-s", "+1 hour")
    try:
        _alive(ground)
        _killed(ground)
    finally:
        second.run("date", "-s", "-1 hour")
    return "the clock of one host is an hour ahead: as without, both ways", 0


def _killed(ground: Locks) -> tuple[str, int]:
    for first, second in (ground.hosts, ground.hosts[::-1]):
        folder = ground.folder()
        for other in (first, second):
            holder = ground.holds(first, folder)
            first.kill(holder)
            assert ground.holds(other, folder).end() == 0
    return "kill -9: let in at once on its host, and after STALE_S without a sign of life on the other", 0


def _switched_off(ground: Locks) -> tuple[str, int]:
    (first, second), folder = ground.hosts, ground.folder()
    ground.holds(first, folder)
    first.switch_off()
    try:
        assert ground.holds(second, folder).end() == 0
    finally:
        first.switch_on()
    assert ground.holds(first, folder).end() == 0
    return "the other host is let in after STALE_S, and the first again when it is back", 0


def _cut_off(ground: Locks) -> tuple[str, int]:
    (first, second), folder = ground.hosts, ground.folder()
    stopped = ground.holds(first, folder)
    first.cut()
    try:
        holder = ground.holds(second, folder)
    finally:
        first.mend()
    assert stopped.wait() == 1
    assert f"process {holder.pid} of {second.name} since" in stopped.said, stopped.said
    assert "took over" in stopped.said, stopped.said
    assert holder.end() == 0
    return "the other host is let in after STALE_S; when the wire is mended the first ends, with status 1", 0


def _server_restarts(ground: Locks) -> tuple[str, int]:
    (first, second), folder = ground.hosts, ground.folder()
    holder = ground.holds(first, folder)
    asking = ground.hold(second, folder)
    ground.server.restart(after_s=3.0)
    assert asking.wait() == 0
    assert f"process {holder.pid} of {first.name} since" in asking.said, asking.said
    ground.server.kill()
    waiting = ground.hold(second, ground.folder())
    time.sleep(3.0)
    ground.server.start()
    waiting.hears("mine")
    assert (holder.end(), waiting.end()) == (0, 0)
    return "the holder keeps it, who asks meanwhile waits for the server and is told; a new one is let in", 0


def _lost_answer(ground: Locks) -> tuple[str, int]:
    (first, second), folder = ground.hosts, ground.folder()
    asking = first.start(sys.executable, "-c", LOST, folder)
    asking.hears("link")
    made = asking.said.split()[-1]
    second.run("ln", folder / made, folder / owner.NAME)
    assert asking.end() == 0, asking.said
    assert "mine" in asking.said, asking.said
    return "the server made the name and its answer was lost; told that it is there, the first knows its own", 0


LOCKS: tuple[Drill[Locks], ...] = (
    Drill("starts at once", _at_once),
    Drill("starts at once where one was killed", _at_once_after_one_killed),
    Drill("a holder that lives", _alive),
    Drill("a holder that was killed", _killed),
    Drill("clocks that differ", _clocks),
    Drill("a holder's host is switched off", _switched_off),
    Drill("a holder is cut off", _cut_off),
    Drill("the server restarts", _server_restarts),
    Drill("a lost answer", _lost_answer),
)


class Run:
    """One run, its folder, shards and index on the disk, a process on each of two hosts."""

    def __init__(self, server: Server, hosts: list[Host], disk: Disk, place: Path) -> None:
        self.server, self.hosts, self.disk, self.place = server, hosts, disk, place
        changes = [f"run.steps={MANY}", f"run.eval_every={MANY}", f"run.checkpoint_every={EVERY}", "run.keep=2"]
        changes += ["mesh.codes=2", "engine.timeout_s=120", "optim.schedule=constant"]
        jobs.write_shards(disk.folder / "shards")
        jobs.write_config(disk.folder, MOUNT / "shards", *changes, f"run.folder={MOUNT / 'run'}")
        self.alone = jobs.write_config(place / "alone", disk.folder / "shards", *changes)
        self.run, self.ranks, self.port = disk.folder / "run", list[Remote](), 29500
        self.order: tuple[Host, ...] = ()

    def start(self, *order: Host) -> None:
        """Rank 0 on the first of the hosts, rank 1 on the second."""
        self.port += 1
        self.order = order
        meeting = {"MASTER_ADDR": order[0].address, "MASTER_PORT": str(self.port), "WORLD_SIZE": str(len(order))}
        self.ranks = [
            self.one(host, meeting | {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"})
            for rank, host in enumerate(order)
        ]

    def one(self, host: Host, environment: dict[str, str], *changes: str) -> Remote:
        return host.start(sys.executable, "launch/train.py", MOUNT / "run.yaml", *changes, env=environment)

    @property
    def said(self) -> str:
        return "\n".join(each.said for each in self.ranks)

    def steps(self, more: int = FEW) -> None:
        """New ones, whatever happened."""
        reached = last_step(self.run)
        until(lambda: last_step(self.run) > reached + more or not self.ranks[0].runs, "new steps", 400.0)
        assert last_step(self.run) > reached + more, self.said

    def lost(self, *order: Host) -> int:
        """Start it again, and wait until it does new steps; how many it does again."""
        reached = last_step(self.run)
        self.start(*order)
        self.ranks[0].hears("going on after step")
        found = GOES_ON.search(self.ranks[0].said)
        assert found is not None
        until(lambda: last_step(self.run) > reached + FEW or not self.ranks[0].runs, "new steps", 400.0)
        assert last_step(self.run) > reached + FEW, self.said
        return reached - int(found[1])

    def end(self) -> None:
        """Whatever becomes of it."""
        for rank, host in zip(self.ranks, self.order, strict=True):
            host.kill(rank)

    def again(self) -> None:
        self.end()
        self.lost(*self.hosts)


def _two_hosts(ground: Run) -> tuple[str, int]:
    ground.start(*ground.hosts)
    until(lambda: last_step(ground.run) > 2 * EVERY or not ground.ranks[0].runs, "the first checkpoints", 600.0)
    assert ground.ranks[0].runs, ground.said
    assert jobs.steps_saved(ground.run), ground.said
    return "a process on each, which writes its share of every checkpoint", 0


def _second_start(ground: Run) -> tuple[str, int]:
    for host in ground.hosts:
        second = ground.one(host, {}, "mesh.codes=1")
        assert second.wait() == 2, second.said
        assert (
            f"another process is writing the run in {MOUNT / 'run'}: process {ground.ranks[0].pid} of h1" in second.said
        )
    ground.steps()
    return "is refused on both hosts and told by whom; the first knows nothing of it", 0


def _server_in_the_middle(ground: Run) -> tuple[str, int]:
    for _ in range(2):
        ground.server.restart(after_s=2.0)
        ground.steps(EVERY)
    return "twice, 2 s without it: the run waits for it, and goes on", 0


def _killed_ranks(ground: Run) -> tuple[str, int]:
    for host, rank in zip(ground.order, ground.ranks, strict=True):
        host.kill(rank)
    return "kill -9 of both ranks; started again it goes on at once", ground.lost(*ground.hosts)


def _read_while_removed(ground: Run) -> tuple[str, int]:
    """A client renames to .nfsXXXX what is removed while it is open there."""
    until(lambda: len(jobs.steps_saved(ground.run)) == 2, "two checkpoints")
    old = checkpoint.finished(ground.run / "checkpoints")[-1]
    file = next((old / "ranges").iterdir()).relative_to(ground.disk.folder)
    reader = ground.hosts[0].start(
        sys.executable, "-c", f"file = open('{MOUNT / file}')\nprint('open', flush=True)\ninput()"
    )
    reader.hears("open")
    until(lambda: not old.exists(), "the next checkpoints", 400.0)
    ground.steps()
    left = [path.name for path in (ground.run / "checkpoints").glob("*.tmp")]
    reader.end()
    ground.steps(2 * EVERY)
    stays = {path.name for path in (ground.run / "checkpoints").glob("*.old.tmp")} & set(left)
    assert not stays, stays
    return f"it is put aside ({len(left)} .tmp), and removed by a later save when nobody reads it", 0


def _full(ground: Run) -> tuple[str, int]:
    ground.disk.fill()
    ends = [rank.wait() for rank in ground.ranks]
    ground.disk.empty()
    assert all(ends), ground.said
    assert re.search("No space left|Disk quota", ground.said), ground.said
    return "says what to do and ends; with room and started again it goes on", ground.lost(*ground.hosts)


def _stop(ground: Run) -> tuple[str, int]:
    ground.hosts[1].run("touch", MOUNT / "run" / "STOP")
    ends = [rank.wait() for rank in ground.ranks]
    assert ends == [jobs.STOPPED] * 2, ground.said
    said = "a file STOP, made on another host: saves and leaves; started again with hosts changed it goes on"
    return said, ground.lost(*ground.hosts[::-1])


def _off(ground: Run) -> tuple[str, int]:
    first, second = ground.hosts
    second.switch_off()  # that of rank 0, which is the writer
    until(lambda: not ground.ranks[1].runs, "that the other rank misses it", 400.0)
    second.switch_on()
    return "without power; started again, it waits for STALE_S and goes on", ground.lost(first, second)


def _cache(ground: Run) -> tuple[str, int]:
    """Two of the same images at once, with one index; one of them is killed, and ended from the other host."""
    ground.end()
    saved_runs.small().save(ground.disk.folder / "tokenizer")
    names = [Path(each).name for each in shard_files.write_shards(ground.disk.folder / "encoded", [200, 200])]
    words = ["tools/encode.py", MOUNT / "tokenizer", "--image-size", "8", "--batch", "1", "--workers", "0"]
    words += [
        "--storage",
        "10",
        "--index-dir",
        MOUNT / "index",
        "--shards",
        *(MOUNT / "encoded" / name for name in names),
    ]
    (first, second), caches = ground.hosts, [ground.disk.folder / name for name in ("one", "two")]
    one, two = (
        host.start(sys.executable, *words[:2], MOUNT / cache.name, *words[2:])
        for host, cache in zip(ground.hosts, caches, strict=True)
    )
    until(lambda: [*caches[0].glob("ids/c.*")] or not one.runs, "the first storage shards", 300.0)
    first.kill(one)
    assert two.wait() == 0, two.said
    said = second.run(sys.executable, *words[:2], MOUNT / "one", *words[2:])
    assert "images are encoded already" in said, said
    mine, theirs = (Cache(cache).ids[:] for cache in caches)
    assert len(mine) == 400
    assert (mine == theirs).all()
    return "two at once, of images whose index both want; one is killed, and ended on the other host: the same ids", 0


RUN: tuple[Drill[Run], ...] = (
    Drill("a run on two hosts", _two_hosts),
    Drill("a second start of the run", _second_start),
    Drill("the server restarts in the middle", _server_in_the_middle),
    Drill("both ranks killed", _killed_ranks, EVERY + FEW),
    Drill("a checkpoint is read while it is removed", _read_while_removed),
    Drill("the disk is full", _full, EVERY + FEW),
    Drill("asked to stop", _stop),
    Drill("a host is switched off", _off, EVERY + FEW),
    Drill("a token cache", _cache),
)


def run(place: Path, out: Path) -> bool:
    """Do all drills, write the table; whether all held."""
    lines: list[Line] = []

    def done(line: Line, version: str) -> None:
        lines.append(line | {"drill": f"{line['drill']}, NFS {version}"})
        print(told(lines[-1]), flush=True)

    with _disk(place / "run") as (folder, disk), nfs.hosts(folder, disk.folder, "4.2") as made:
        ground = Run(*made, disk, folder)
        for each in RUN:
            done(drilled.line(ground, each, ground.again), "4.2")
        ground.end()
        done(_same(ground), "4.2")
    for version in nfs.VERSIONS:
        with (
            _disk(place / version.replace(" ", "-")) as (folder, disk),
            nfs.hosts(folder, disk.folder, version) as made,
        ):
            locks = Locks(*made, disk.folder)
            for drill in LOCKS:
                done(drilled.line(locks, drill, lambda: None), version)
    facts = {"server": _version("ganesha.nfsd", "-v"), "hosts": "user-mode Linux " + _version("linux.uml", "--version")}
    drilled.write(out, "nfs", "bash tests/nfs.sh", lines, **facts)
    return all(line["held"] is not False for line in lines)


@contextlib.contextmanager
def _disk(place: Path) -> Iterator[tuple[Path, Disk]]:
    """A folder for what the drills keep, and the disk that the server exports."""
    place.mkdir()
    with mounted(place / "disk", 256 << 20) as disk:
        if disk.lacking:
            raise OSError(disk.lacking)
        yield place, disk


def _same(ground: Run) -> Line:
    theirs = logged(ground.run)
    mine = undisturbed(ground.alone, ground.place / "undisturbed", theirs[-1]["step"])
    other = [one["step"] for one, two in zip(mine, theirs, strict=False) if one != two]
    same = not other and len(mine) == len(theirs)
    happens = f"{len(theirs)} steps, beside as many of a run on two processes of one host that nothing happened to"
    outcome = "every number that was logged is equal in every bit" if same else f"NOT the same at step {other[:1]}"
    return {"drill": "all of them together", "happens": happens, "lost": 0, "held": same, "outcome": outcome}


def _version(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[0]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="vqscale-nfs-") as folder:
        sys.exit(0 if run(Path(folder), asked.out) else 1)
