#!/usr/bin/env python
"""`python tools/sample.py ...` is `vqscale sample ...` of this checkout: vqscale/programs/commands/sample.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqscale.programs.commands.sample import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
