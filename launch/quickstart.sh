#!/usr/bin/env bash
# From nothing to a trained tokenizer: set up, make shards, train on two processes with the codebook sharded over them
# (one per GPU where there are several), evaluate on held-out shards, show. Run again, it continues or says it is done.
#
#   bash launch/quickstart.sh [dotted.key=value ...]      e.g. run.folder=runs/second tokenizer.quantizer.num_codes=8192
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment

processes=$(python -c 'import torch; n = torch.cuda.device_count(); print(n if n > 1 else 1 if n else 2)')
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}
torchrun --nproc_per_node="$processes" launch/train.py configs/quickstart/tokenizer.yaml "$@"
python tools/summary.py configs/quickstart/tokenizer.yaml "$@"
