#!/usr/bin/env python
"""`torchrun launch/train.py ...` is `vqscale train ...` of this checkout: vqscale/programs/commands/train.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqscale.programs.commands.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
