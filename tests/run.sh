#!/usr/bin/env bash
# Everything that must hold: lint, format, types, the whole suite. Sets itself up; arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment test

export OMP_NUM_THREADS=1
ruff check .
ruff format --check .
mypy
python -m pytest "$@"
