#!/usr/bin/env python
"""`python tools/plan.py ...` is `vqscale plan ...` of this checkout: vqscale/programs/commands/plan.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqscale.programs.commands.plan import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
