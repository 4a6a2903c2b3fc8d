"""Hosts with kernels of their own on one NFS, all on this machine: user-mode Linux, and Ganesha as the server.

Needs root, and what nfs.sh installs; whoever calls is in a network, mount and process namespace of its own (that sees
to it, too), so nothing of this is left behind. A host sees the files of this machine, read-only, and the disk at MOUNT.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

MOUNT = Path("/mnt")
NET, BRIDGE, AGENT_PORT = "10.78.0", "vqdisk", 7000
VERSIONS = {"4.2": "vers=4.2", "3 without locks": "vers=3,nolock,mountport=20048,mountproto=tcp,mountvers=3"}
GRACE_S = 15

CONF = """\
NFS_CORE_PARAM {{ Protocols = 3, 4; Enable_NLM = false; Enable_RQUOTA = false; Enable_UDP = false;
                  mount_path_pseudo = true; MNT_Port = 20048; }}
NFSV4 {{ Grace_Period = {grace}; Lease_Lifetime = {grace}; RecoveryBackend = fs; RecoveryRoot = "{place}/recovery"; }}
EXPORT {{ Export_Id = 1; Path = {disk}; Pseudo = /disk; Access_Type = RW; Squash = No_Root_Squash; SecType = sys;
          Protocols = 3, 4; FSAL {{ Name = VFS; }} }}
"""
INIT = """\
#!/bin/bash
export PATH=$PATH:/usr/sbin:/sbin TMPDIR=/run/tmp HOME=/run/tmp PYTHONDONTWRITEBYTECODE=1 OMP_NUM_THREADS=1
export GLOO_SOCKET_IFNAME=vec0 MASTER_ADDR={net}.11
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmpfs /run
mkdir -p /dev/shm /run/tmp /run/modules/lib; mount -t tmpfs tmpfs /dev/shm
ln -s /usr/lib/uml/modules /run/modules/lib/modules
hostname $NAME; ip link set lo up; ip addr add $ADDRESS/24 dev vec0; ip link set vec0 up
for name in nfsv3 nfsv4; do modprobe -d /run/modules $name; done
mount -i -t nfs -o addr={net}.1,clientaddr=$ADDRESS,proto=tcp,$OPTIONS {net}.1:/disk {mount}
cd {root} && exec {python} {agent}
"""


class Server:
    """Exports a folder; what clients have open, and their locks, outlive its restart as they do that of a machine."""

    def __init__(self, place: Path, disk: Path) -> None:
        self.place = place
        (place / "recovery").mkdir()
        (place / "ganesha.conf").write_text(CONF.format(grace=GRACE_S, place=place, disk=disk))
        self.start()

    def start(self) -> None:
        words = ["-F", "-f", "ganesha.conf", "-L", "ganesha.log", "-p", "ganesha.pid"]
        self.process = subprocess.Popen(["ganesha.nfsd", *words], cwd=self.place)
        until(lambda: _listens(f"{NET}.1", 2049), "the NFS server")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def restart(self, after_s: float = 0.0) -> None:
        self.kill()
        time.sleep(after_s)
        self.start()


class Host:
    """A machine of its own: kernel, clock, processes, its mount of the disk."""

    def __init__(self, place: Path, number: int, options: str) -> None:
        self.name, self.address, self._place, self._options = f"h{number}", f"{NET}.{10 + number}", place, options
        self._wire = f"vqtap{number}"
        self.switch_on()

    def switch_on(self) -> None:
        init = self._place / "init.sh"
        words = ["root=/dev/root", "rootfstype=hostfs", "rootflags=/", "ro", f"init={init}", "mem=1536M", "quiet"]
        words += ["con0=null,fd:1", "con=null", "ssl=null"]
        words += [
            f"vec0:transport=tap,ifname={self._wire},depth=64,gro=1",
            f"NAME={self.name}",
            f"ADDRESS={self.address}",
        ]
        with (self._place / f"{self.name}.log").open("ab") as log:
            told = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "start_new_session": True}
            told["env"] = os.environ | {"HOME": str(self._place)}  # where it keeps its sockets
            self.process = subprocess.Popen(["linux.uml", *words, f"OPTIONS={self._options}"], **told)
        until(lambda: _listens(self.address, AGENT_PORT), f"{self.name}, see {self._place}", 120.0)

    def switch_off(self) -> None:
        """As without power."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def cut(self) -> None:
        _run("ip", "link", "set", self._wire, "nomaster")

    def mend(self) -> None:
        _run("ip", "link", "set", self._wire, "master", BRIDGE)

    def start(self, *words: object, env: Mapping[str, str] | None = None) -> Remote:
        return Remote(self, [str(word) for word in words], dict(env or {}))

    def run(self, *words: object, env: Mapping[str, str] | None = None) -> str:
        """What a program printed, which must end well."""
        remote = self.start(*words, env=env)
        assert remote.wait() == 0, remote.said
        return remote.said

    def kill(self, remote: Remote) -> None:
        """kill -9, and wait for its end."""
        self.run("bash", "-c", f"kill -9 {remote.pid} || true")
        remote.wait()


class Remote:
    """A program on a host."""

    def __init__(self, host: Host, words: list[str], env: dict[str, str]) -> None:
        self._socket = socket.create_connection((host.address, AGENT_PORT), 60.0)
        self._socket.settimeout(None)
        self._socket.sendall(json.dumps({"words": words, "env": env}).encode() + b"\n")
        self._heard = bytearray()
        self._listening = threading.Thread(target=self._listen, daemon=True)
        self._listening.start()
        until(lambda: b"\n" in self._heard, f"the start of {words[:3]}")
        self.pid = int(self._heard.partition(b"\n")[0])

    def _listen(self) -> None:
        with contextlib.suppress(OSError):
            while block := self._socket.recv(1 << 16):
                self._heard += block

    @property
    def said(self) -> str:
        return self._heard.partition(b"\n")[2].partition(b"\0")[0].decode(errors="replace")

    def hears(self, text: str, seconds: float = 300.0) -> None:
        until(lambda: text in self.said or not self.runs, f"{text!r}", seconds)
        assert text in self.said, self.said

    @property
    def runs(self) -> bool:
        return self._listening.is_alive()

    def end(self) -> int:
        """Close what it reads from."""
        self._socket.shutdown(socket.SHUT_WR)
        return self.wait()

    def wait(self, seconds: float = 600.0) -> int:
        """Its exit status, negative for a signal, as the agent said last."""
        self._listening.join(seconds)
        assert not self.runs, f"did not end within {seconds} s:\n{self.said}"
        return int(re.search(rb"\0(-?\d+)$", bytes(self._heard))[1])  # type: ignore[index]


@contextlib.contextmanager
def hosts(place: Path, disk: Path, version: str, count: int = 2) -> Iterator[tuple[Server, list[Host]]]:
    """A server of a folder and hosts that have mounted it; gone after the block."""
    init = place / "init.sh"
    agent = Path(__file__).with_name("nfs_agent.py")
    known = {"net": NET, "mount": MOUNT, "root": agent.parents[2], "python": sys.executable, "agent": agent}
    init.write_text(INIT.format(**known))
    init.chmod(0o755)
    made: list[Host] = []
    with _network(count):
        server = Server(place, disk)
        try:
            made += [Host(place, number, VERSIONS[version]) for number in range(1, count + 1)]
            yield server, made
        finally:
            for host in made:
                host.switch_off()
            server.kill()


@contextlib.contextmanager
def _network(count: int) -> Iterator[None]:
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "link", "add", BRIDGE, "type", "bridge")
    wires = [f"vqtap{number}" for number in range(1, count + 1)]
    try:
        _run("ip", "addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        for wire in wires:
            _run("ip", "tuntap", "add", wire, "mode", "tap")
            _run("ip", "link", "set", wire, "master", BRIDGE, "up")
        _run("ip", "link", "set", BRIDGE, "up")
        names = subprocess.Popen(["rpcbind", "-w", "-f"])
        try:
            until(lambda: _listens("127.0.0.1", 111), "rpcbind")
            yield
        finally:
            names.kill()
            names.wait()
    finally:
        for name in (*wires, BRIDGE):
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("ip", "link", "del", name)


def until(there: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not there():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.02)


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), 1.0).close()
    except OSError:
        return False
    return True


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)
