#!/usr/bin/env bash
# From nothing to a page that one can listen to: set up, make shards of sounds, train a tokenizer of sounds on two
# processes with the codebook sharded over them, encode the shards, train a small prior over their ids, draw sounds,
# train a classifier that judges drawn sounds, measure whole held-out recordings, and put these above their
# reconstructions, and what was drawn, on one page. Run again, each stage continues or says that it is done.
#
#   bash launch/sound.sh [key=value ...] [-- key=value ...] [-- --option value ...]
#   SOURCE=/data/my_recordings bash launch/sound.sh
#
# What stands before -- changes keys of configs/quickstart/sound.yaml, what stands after it those of
# configs/quickstart/sound_prior.yaml, what stands after another one are options of tools/classifier.py. With SOURCE
# the sounds are the recordings (wav, flac, mp3, ogg, opus) in that folder: folders directly below it are the classes, a
# tenth of the files is held out, and nothing judges; RUN (runs/sound) names the folder of the tokenizer, beside which
# all others are. The drawn ones take 10 minutes on two cores with other work.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment audio

first=() second=() third=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do first+=("$1"); shift; done
[ $# -eq 0 ] || shift
while [ $# -gt 0 ] && [ "$1" != -- ]; do second+=("$1"); shift; done
[ $# -eq 0 ] || { shift; third=("$@"); }

processes=$(python -c 'import torch; n = torch.cuda.device_count(); print(n if n > 1 else 1 if n else 2)')
threads=$(($(nproc) / processes))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((threads > 0 ? threads : 1))}

stage() { printf '\n=== %s (%d:%02d since the start)\n' "$1" $((SECONDS / 60)) $((SECONDS % 60)); }

run=${RUN:-runs/sound}
own=()
if [ -n "${SOURCE:-}" ]; then
    stage "0 of 6: shards of $SOURCE"
    count=$(find "$SOURCE" -type f | grep -ciE '\.(wav|flac|mp3|ogg|opus)$' || true)
    if [ "$count" -lt 20 ]; then
        echo "error: $SOURCE has $count recordings, and at least 20 are needed: give another folder" >&2
        exit 2
    fi
    python tools/make_shards.py --source "$SOURCE" --medium sounds --out "$run-shards" --name all --shard-size $(((count + 9) / 10))
    shards=("$run-shards"/all-*.tar)
    last=$((${#shards[@]} - 1))
    number() { local name=${shards[$1]##*-}; printf %s "${name%.tar}"; }
    train="$run-shards/all-{$(number 0)..$(number $((last - 1)))}.tar"
    own=("data.train.shards=$(quoted "$train")" data.train.make=null "data.val.shards=$(quoted "${shards[$last]}")" data.val.make=null)
    classes=0
    [ ! -f "$run-shards/classes.txt" ] || classes=$(wc -l <"$run-shards/classes.txt")
    second=("prior.num_classes=$classes" ${second[@]+"${second[@]}"})
fi

tokenizer=(configs/quickstart/sound.yaml "run.folder=$(quoted "$run")" ${own[@]+"${own[@]}"} ${first[@]+"${first[@]}"})
asked() { python tools/summary.py --key "$1" "${tokenizer[@]}"; } # a key of its config; nothing where that is null

stage "1 of 6: the tokenizer"
start launch/train.py "${tokenizer[@]}"

encode() { # SPLIT
    start tools/encode.py "$run" "$run-cache/$1" --medium sounds --shards "$(asked "data.$1.shards")" --workers 1
}
stage "2 of 6: ids of the sounds"
encode train
encode val

stage "3 of 6: the prior"
start launch/train.py configs/quickstart/sound_prior.yaml run.folder="$(quoted "$run-prior")" tokenizer="$(quoted "$run")" \
    data.train.path="$(quoted "$run-cache/train")" data.val.path="$(quoted "$run-cache/val")" ${second[@]+"${second[@]}"}

stage "4 of 6: new sounds"
start tools/sample.py "$run-prior" "$run" "$run-samples" --num-images 20 --batch 10 --temperature 0.9 --overwrite

stage "5 of 6: a judge of the sounds"
judge=()
if [ -n "$(asked data.val.make)" ]; then # it knows drawn sounds alone
    rate=$(asked tokenizer.signal.sample_rate)
    start tools/classifier.py "$run-classifier" --medium sounds --sample-rate "$rate" ${third[@]+"${third[@]}"}
    judge=(--classifier "$run-classifier")
fi

stage "6 of 6: held-out recordings, whole, and the page"
start tools/evaluate.py sounds "$run" --shards "$(asked data.val.shards)" --samples "$run-samples" \
    ${judge[@]+"${judge[@]}"} --out "$run-page"
printf '\nall done in %d:%02d; open %s in a browser\n' $((SECONDS / 60)) $((SECONDS % 60)) "$run-page/index.html"
