#!/usr/bin/env bash
# Dense prediction by guiding codes, from nothing to a page: draw scenes whose depth and segments are known, and for
# depth, colour and panoptic segments train a tokenizer of the labels that sees the image, a prior that tells its ids
# from the image, and measure what the ids tell. Run again, each stage continues or says that it is done.
#
#   bash launch/dense.sh [key=value ...] [-- key=value ...] [-- TASK ...]
#
# What stands before -- changes keys of configs/quickstart/{depth,color,panoptic}.yaml, e.g. run.steps=2000; what stands
# after it those of the priors beside them; after another one stand the tasks, if not all three. Everything is in the
# folder runs/dense, with run.folder=runs/second in that one.
#
# At its shipped lengths 18 minutes on two cores that other work was on, too, 21 of CPU; 9 of them for the prior of
# segments.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment

place=runs/dense first=() second=() tasks=(depth color panoptic)
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in run.folder=*) place=${1#run.folder=} ;; *) first+=("$1") ;; esac
    shift
done
[ $# -eq 0 ] || shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do second+=("$1"); shift; done
[ $# -eq 0 ] || { shift; tasks=("$@"); }

processes=$(python -c 'import torch; n = torch.cuda.device_count(); print(n if n > 1 else 1 if n else 2)')
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

stage() { printf '\n=== %s (%d:%02d since the start)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

pages=()
for task in "${tasks[@]}"; do
    run=$place/$task
    stage "$task: the tokenizer"
    start launch/train.py "configs/quickstart/$task.yaml" run.folder="$(quoted "$run")" ${first[@]+"${first[@]}"}
    stage "$task: the prior"
    start launch/train.py "configs/quickstart/${task}_prior.yaml" run.folder="$(quoted "$run-prior")" tokenizer="$(quoted "$run")" \
        ${second[@]+"${second[@]}"}
    stage "$task: what the ids tell"
    start tools/evaluate.py dense "$run" --prior "$run-prior" --out "$run-measured"
    pages+=("$run-measured")
done
python tools/page.py --dense "${pages[@]}" --out "$place.html"
printf '\nall done in %d:%02d; open %s in a browser\n' $((SECONDS / 60)) $((SECONDS % 60)) "$place.html"
