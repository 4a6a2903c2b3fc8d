"""A small disk of its own, which can be filled to the last byte and emptied: a tmpfs, where this user may mount one."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

BLOCK = b"\0" * (1 << 16)


class Disk:
    """`lacking` says why it cannot be filled, where it cannot: then it is a folder."""

    def __init__(self, folder: Path, lacking: str) -> None:
        self.folder, self.lacking = folder, lacking
        self._filler = folder / "filler"

    def fill(self) -> None:
        """Until it takes no byte more."""
        with self._filler.open("ab", buffering=0) as file:
            for block in (BLOCK, BLOCK[:1]):
                with contextlib.suppress(OSError):
                    while file.write(block):
                        pass

    def empty(self) -> None:
        """As it was before."""
        self._filler.unlink(missing_ok=True)


@contextlib.contextmanager
def mounted(folder: Path, size: int) -> Iterator[Disk]:
    """A disk of `size` bytes on a folder while the block runs; what is on it goes with it."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "vqscale-soak", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
        lacking = done.stderr.strip() if done.returncode else ""
    except OSError as error:
        lacking = str(error)
    try:
        yield Disk(folder, f"no disk can be mounted: {lacking}" if lacking else "")
    finally:
        if not lacking:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
