"""A SLURM of one machine for tests: real daemons, no systemd, no cgroups, everything in one folder. Needs root."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch")

CONF = """\
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
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
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""


def available() -> bool:
    return os.geteuid() == 0 and all(shutil.which(name, path=_path()) for name in DAEMONS)


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])


@contextlib.contextmanager
def cluster(place: Path) -> Iterator[dict[str, str]]:
    """The environment with which sbatch, squeue, scancel and scontrol talk to a cluster of one node."""
    for name in ("state", "log", "run/n1", "munge"):
        (place / name).mkdir(parents=True)
    (place / "munge").chmod(0o700)
    key = place / "munge" / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    (place / "slurm.conf").write_text(CONF.format(host=host, place=place, ports=_free_ports(3)))
    environment = {**os.environ, "PATH": _path(), "SLURM_CONF": str(place / "slurm.conf")}

    def run(*words: str) -> None:
        subprocess.run(words, env=environment, check=True, capture_output=True, text=True, timeout=60)

    munge = {"key-file": "key", "socket": "sock", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    try:
        run("munged", "--force", *(f"--{name}={place}/munge/munge.{end}" for name, end in munge.items()))
        (place / "munge").chmod(0o755)
        run("slurmctld", "-f", environment["SLURM_CONF"], "-i")
        run("slurmd", "-f", environment["SLURM_CONF"], "-N", "n1")
        deadline = time.monotonic() + 60
        while "idle" not in ask(environment, "sinfo", "-h", "-o", "%T"):
            assert time.monotonic() < deadline, (place / "log" / "slurmctld.log").read_text()[-2000:]
            time.sleep(0.2)
        yield environment
    finally:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            subprocess.run(["scancel", "--full", "-u", "root"], env=environment, timeout=30, capture_output=True)
            time.sleep(1)
        for pid in [*(place / "run").glob("*.pid"), place / "munge" / "munge.pid"]:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(pid.read_text()), signal.SIGTERM)


def ask(environment: dict[str, str], *words: str) -> str:
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60).stdout


def _free_ports(num: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(num)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
