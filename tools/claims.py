#!/usr/bin/env python
"""`python tools/claims.py ...` is `vqscale claims ...` of this checkout: vqscale/programs/commands/claims.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqscale.programs.commands.claims import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
