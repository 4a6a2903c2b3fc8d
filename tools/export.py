#!/usr/bin/env python
"""`python tools/export.py ...` is `vqscale export ...`: vqscale/programs/commands/export.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqscale.programs.commands.export import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
