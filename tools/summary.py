#!/usr/bin/env python
"""`python tools/summary.py ...` is `vqscale summary ...` of this checkout: vqscale/programs/commands/summary.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqscale.programs.commands.summary import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
