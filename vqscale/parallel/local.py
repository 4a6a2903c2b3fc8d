"""Start a program on several processes of this machine, of which nothing listens to the network.

    python -m vqscale.parallel.local 2 launch/train.py [word ...]
    python -m vqscale.parallel.local 2 -m vqscale train [word ...]

It is torchrun in all else. By itself torchrun listens on every interface and believes whoever speaks to it: its agent,
which here has a file for a meeting place, and the first process, which here is given a socket of loopback (`connect` in
mesh.py). Not here: several machines, which must listen to each other (launch/README.md).
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Sequence

from torch.distributed import run as torchrun


def main(words: Sequence[str]) -> None:
    """Run until the processes have ended; SystemExit with 1 where one of them failed, as torchrun has it."""
    if len(words) < 2 or not words[0].isdecimal():
        raise SystemExit(f"error: {' '.join(words) or 'nothing'} is given: give a number of processes, and a program")
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # or the agent opens a socket for the processes
    with tempfile.TemporaryDirectory(prefix="vqscale-local-") as folder:
        meeting = ["--rdzv-backend=c10d", f"--rdzv-endpoint={folder}/meeting", "--rdzv-conf=store_type=file"]
        torchrun.main([*meeting, "--local-addr=127.0.0.1", f"--nproc-per-node={words[0]}", *words[1:]])


if __name__ == "__main__":
    main(sys.argv[1:])
