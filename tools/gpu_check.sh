#!/usr/bin/env bash
# All that a machine with a GPU has to show, within eight minutes: tests, the benchmark's table, a training step, NCCL.
# Needs a Python (3.11 or newer; PYTHON=/path/to/python chooses one) with torch and triton, and installs nothing.
#
#   bash tools/gpu_check.sh                 # --help says what its parts are; the numbers go to tools/results/gpu/
#   bash tools/gpu_check.sh --interpret     # the same program on a CPU, at tiny sizes
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$(command -v python || command -v python3 || echo python)}
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $python is no Python 3.11 or newer: give one as PYTHON=/path/to/python bash tools/gpu_check.sh" >&2
  exit 2
fi
exec "$python" tools/bench gpu "$@"
