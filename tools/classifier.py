#!/usr/bin/env python
"""`python tools/classifier.py ...` is `vqscale classifier ...` of this checkout, see vqscale/programs/commands."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqscale.programs.commands.classifier import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
