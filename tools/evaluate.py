#!/usr/bin/env python
"""`python tools/evaluate.py ...` is `vqscale evaluate ...` of this checkout: vqscale/programs/commands/evaluate/."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqscale.programs.commands.evaluate import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
