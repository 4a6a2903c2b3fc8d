#!/usr/bin/env python
"""`python tools/import_checkpoint.py ...` is `vqscale import ...`: vqscale/programs/commands/import_checkpoint.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqscale.programs.commands.import_checkpoint import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
