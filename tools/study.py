#!/usr/bin/env python
"""`python tools/study.py ...` is `vqscale study ...` of this checkout: vqscale/programs/commands/study.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqscale.programs.commands.study import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
