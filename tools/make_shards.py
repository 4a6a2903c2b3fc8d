#!/usr/bin/env python
"""`python tools/make_shards.py ...` is `vqscale shards ...` of this checkout: vqscale/programs/commands/shards.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vqscale.programs.commands.shards import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
