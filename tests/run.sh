#!/usr/bin/env bash
# Everything that must hold: lint, format, types, the whole suite. Sets itself up; arguments go to pytest, which runs two
# tests at a time (-n 4: four; -n 0: in one process, as --pdb needs it).
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment test

export OMP_NUM_THREADS=1
ruff check .
ruff format --check .
mypy
python -m pytest -n 2 --dist worksteal "$@"
