"""One process of a job of SLURM: the program that it is given, run as python would, with its exit status kept.

torchrun answers 1 for every status but 0, so rank 0 writes its own into VQSCALE_STATUS_FILE. Nothing is written where
the program died: then torchrun's answer is the job's. Started by job.sh.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path


def main(words: list[str]) -> int:
    sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as left:
        if left.code is not None and not isinstance(left.code, int):
            print(left.code, file=sys.stderr)
            return 1
        return left.code or 0
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    if os.environ["RANK"] == "0":
        Path(os.environ["VQSCALE_STATUS_FILE"]).write_text(f"{status}\n")
    sys.exit(status)
