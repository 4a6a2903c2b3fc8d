#!/usr/bin/env bash
# From nothing to new pictures: set up, make shards, train a tokenizer on two processes with the codebook sharded over
# them (one per GPU where there are several), encode the shards, train a small prior over the ids of ten classes, draw
# pictures of every class, train a classifier that judges them, and tell it all on one page. Run again, each stage
# continues or says that it is done.
#
#   bash launch/quickstart.sh [key=value ...] [-- key=value ...] [-- --option value ...]
#
# What stands before -- changes keys of configs/quickstart/tokenizer.yaml, e.g. tokenizer.quantizer.num_codes=8192; what
# stands after it those of configs/quickstart/prior.yaml, e.g. -- run.steps=4000; what stands after another one are
# options of tools/classifier.py. With run.folder=runs/second all other folders are beside it: runs/second-cache,
# runs/second-prior, runs/second-samples, runs/second-classifier, runs/second.html.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment

first=() second=() third=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do first+=("$1"); shift; done
[ $# -eq 0 ] || shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do second+=("$1"); shift; done
[ $# -eq 0 ] || { shift; third=("$@"); }

processes=$(python -c 'import torch; n = torch.cuda.device_count(); print(n if n > 1 else 1 if n else 2)')
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

stage() { printf '\n=== %s (%d:%02d since the start)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

stage "1 of 6: the tokenizer"
tokenizer=(configs/quickstart/tokenizer.yaml ${first[@]+"${first[@]}"})
asked() { python tools/summary.py --key "$1" "${tokenizer[@]}"; } # a key of its config; nothing where that is null
start launch/train.py "${tokenizer[@]}"
python tools/summary.py "${tokenizer[@]}"
run=$(asked run.folder)

encode() { # SPLIT [OPTION ...]
    local split=$1 index; shift
    index=$(asked "data.$split.index_dir")
    start tools/encode.py "$run" "$run-cache/$split" --shards "$(asked "data.$split.shards")" --batch 256 --workers 1 \
        ${index:+--index-dir "$index"} "$@"
}
stage "2 of 6: ids of the pictures"
encode train --views flip
held_out=data.val=null
if [ -n "$(asked data.val.shards)" ]; then
    encode val
    held_out=data.val.path=$(quoted "$run-cache/val")
fi

stage "3 of 6: the prior"
start launch/train.py configs/quickstart/prior.yaml run.folder="$(quoted "$run-prior")" tokenizer="$(quoted "$run")" \
    data.train.path="$(quoted "$run-cache/train")" "$held_out" ${second[@]+"${second[@]}"}

stage "4 of 6: new pictures of every class"
start tools/sample.py "$run-prior" "$run" "$run-samples" --per-class 8 --guidance 3 --temperature 0.8 --batch 20 \
    --overwrite

stage "5 of 6: a judge of the pictures"
judge=()
if [ -n "$(asked data.train.make)" ]; then # it knows drawn shapes alone
    start tools/classifier.py "$run-classifier" --image-size "$(asked data.train.image_size)" ${third[@]+"${third[@]}"}
    start tools/evaluate.py samples "$run-samples/samples.npz" --classifier "$run-classifier" --out "$run-prior/judged"
    judge=(--classifier "$run-classifier")
fi

stage "6 of 6: the page"
python tools/page.py "$run" "$run-prior" "$run-samples" ${judge[@]+"${judge[@]}"} --out "$run.html"
printf '\nall done in %d:%02d; open %s in a browser\n' $((SECONDS / 60)) $((SECONDS % 60)) "$run.html"
