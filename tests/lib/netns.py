"""Hosts of their own on one machine, each with a name, an address and a wire that can be cut: network namespaces. Needs
root, and a kernel that lets it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator

BRIDGE, NET = "vqbridge", "10.77.0"
ROOT = f"{NET}.1"  # this machine, as the hosts see it


class Hosts:
    """n1, n2, ... on one bridge."""

    def __init__(self, count: int) -> None:
        self.addresses = {f"n{i}": f"{NET}.{10 + i}" for i in range(1, count + 1)}

    def enter(self, name: str) -> list[str]:
        """What stands before a command that a host is to run."""
        inside = ["nsenter", f"--net=/run/netns/vq{name}", "unshare", "--uts"]
        return [*inside, "bash", "-c", f'hostname {name} && exec "$@"', "bash"]

    def switch_off(self, name: str) -> None:
        """As without power: every process of the host is gone at once."""
        for pid in map(int, _ip("netns", "pids", f"vq{name}").split()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def cut(self, name: str) -> None:
        _ip("link", "set", f"vq{name}", "down")

    def mend(self, name: str) -> None:
        _ip("link", "set", f"vq{name}", "up")


@contextlib.contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """They are gone after the block. OSError where this user or this kernel makes none."""
    made = Hosts(count)
    try:
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{ROOT}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        for name, address in made.addresses.items():
            space = f"vq{name}"
            _ip("netns", "add", space)
            _ip("link", "add", space, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", space, "master", BRIDGE, "up")
            _ip("-n", space, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                _ip("-n", space, "link", "set", device, "up")
        yield made
    finally:
        spaces = [f"vq{name}" for name in made.addresses]
        made_here = [(kind, space) for kind in ("link", "netns") for space in spaces]
        for kind, name in (*made_here, ("link", BRIDGE)):
            with contextlib.suppress(OSError):
                _ip(kind, "del", name)


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout
