#!/usr/bin/env python
"""`python tools/soak.py ...` is `vqscale soak ...` of this checkout: vqscale/programs/commands/soak.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqscale.programs.commands.soak import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
