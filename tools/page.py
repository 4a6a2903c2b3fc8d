#!/usr/bin/env python
"""`python tools/page.py ...` is `vqscale page ...` of this checkout: vqscale/programs/commands/page.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqscale.programs.commands.page import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
