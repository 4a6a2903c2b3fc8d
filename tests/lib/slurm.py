"""A SLURM of one machine for tests: real daemons, no systemd, no cgroups, everything in one folder. Needs root.

Its nodes are daemons on this machine, or, with hosts (netns.py), each on a host of its own.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import netns
from netns import Hosts

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")

CONF = """\
ClusterName=tiny
SlurmctldHost={host}({address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={place}/munge/munge.sock,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=1,sched_interval=2,sched_min_interval=100000,bf_interval=2
ReturnToService=2
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/run/%n
SlurmctldPidFile={place}/run/slurmctld.pid
SlurmdPidFile={place}/run/slurmd-%n.pid
SlurmctldLogFile={place}/log/slurmctld.log
SlurmdLogFile={place}/log/slurmd-%n.log
KillWait=30
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
{nodes}
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr={address} Port={port} CPUs=2 RealMemory=1000 State=UNKNOWN"
TRAIN = Path(__file__).resolve().parents[2] / "launch" / "slurm" / "train.sbatch"


def available() -> bool:
    return os.geteuid() == 0 and all(shutil.which(name, path=_path()) for name in DAEMONS)


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


@contextlib.contextmanager
def cluster(place: Path, num_nodes: int = 1, hosts: Hosts | None = None) -> Iterator[dict[str, str]]:
    """The environment with which sbatch, squeue, scancel and scontrol talk to a cluster of nodes n1, n2, ..."""
    names = [f"n{number}" for number in range(1, num_nodes + 1)]
    for name in ("state", "log", "munge", *(f"run/{name}" for name in names)):
        (place / name).mkdir(parents=True)
    (place / "munge").chmod(0o700)
    key = place / "munge" / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    ports = _free_ports(2 + num_nodes)
    nodes = [
        NODE.format(name=name, host=name, address=hosts.addresses[name], port=port)
        if hosts
        else NODE.format(name=name, host=host, address="127.0.0.1", port=port)
        for name, port in zip(names, ports[2:], strict=True)
    ]
    known = {"address": netns.ROOT if hosts else "127.0.0.1", "ports": ports, "nodes": "\n".join(nodes)}
    (place / "slurm.conf").write_text(CONF.format(host=host, place=place, **known))
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(place / "slurm.conf")}

    def run(*words: str) -> None:
        _run(environment, *words)

    munge = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    try:
        run("munged", "--force", *(f"--{name}={place}/munge/munge.{end}" for name, end in munge.items()))
        (place / "munge").chmod(0o755)
        run("slurmctld", "-f", environment["SLURM_CONF"], "-i")
        for name in names:
            start_node(environment, name, hosts)
        deadline = time.monotonic() + 60
        while ask(environment, "sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N").split() != names:
            assert time.monotonic() < deadline, (place / "log" / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.2)
        yield environment
    finally:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scancel", "--full", "-u", "root"], env=environment, timeout=30, capture_output=True)
            deadline = time.monotonic() + 60  # a daemon waits for steps, which end while the controller lives
            while ask(environment, "squeue", "-h") and time.monotonic() < deadline:
                time.sleep(0.2)
        for pid in [*(place / "run").glob("*.pid"), place / "munge" / "munge.pid"]:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(pid.read_text()), signal.SIGTERM)


def start_node(environment: dict[str, str], name: str, hosts: Hosts | None) -> None:
    """Its daemon; at first, and after its host was switched off."""
    _run(environment, *(hosts.enter(name) if hosts else ()), "slurmd", "-f", environment["SLURM_CONF"], "-N", name)


def _run(environment: dict[str, str], *words: str) -> None:
    subprocess.run(words, env=environment, check=True, capture_output=True, text=True, timeout=60)


def ask(environment: dict[str, str], *words: str) -> str:
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60).stdout


def submit(environment: dict[str, str], place: Path, log: Path, *words: str) -> str:
    """The job of `sbatch WORDS` from PLACE/checkout, which links to this one; it prints into `log`."""
    checkout = place / "checkout"
    if not checkout.exists():
        checkout.mkdir(parents=True)
        for name in ("launch", "tools"):
            (checkout / name).symlink_to(TRAIN.parents[2] / name)
    environment = {**environment, "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    command = ["sbatch", "--parsable", f"--output={log}", *words]
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _free_ports(num: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
