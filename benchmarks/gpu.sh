#!/usr/bin/env bash
# The whole GPU measurement in one call of under ten minutes: kernel tests, then prediction (batch 1 and 8) and training
# (batch 16, bfloat16) of the cascade and of the mask cascade, each beside torchvision's model in the same run.
#
#   bash benchmarks/gpu.sh [OUT]                        # on a machine with a GPU; OUT is a folder (benchmarks/results)
#   DEVICE=cpu SIZE="64 96" BATCHES=1 TRAIN_BATCH=1 COMPILE= LIMIT=600 bash benchmarks/gpu.sh /tmp/try   # try the script
#
# OUT/results.md is the table for benchmarks/NOTES.md. Seven parts of at most LIMIT seconds, TOTAL seconds in all: a part
# that fails or hangs costs no more than that, and the others go on. BOXES and MASKS name other recipes; COMPILE= and
# TESTS= leave out what is compiled, and the tests.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
device=${DEVICE:-cuda}
size=${SIZE:-800 1088}
batches=${BATCHES:-1 8}
train_batch=${TRAIN_BATCH:-16}
compile=${COMPILE---compile}
tests=${TESTS-yes}
boxes=${BOXES:-cascade_rcnn_r50_fpn_1x_coco}
masks=${MASKS:-cascade_mask_rcnn_r50_fpn_1x_coco}
limit=${LIMIT:-140}
total=${TOTAL:-580}
python=${PYTHON:-python3}
rounds=${ROUNDS:+--rounds $ROUNDS}
mkdir -p "$out"
# Of an earlier measurement, and nothing else that may lie there
rm -f "$out"/{predict,train}_{boxes,masks}_batch*.{json,txt} "$out"/kernel_tests.txt "$out"/results.md
failed=0

run() {  # NAME COMMAND...
    local name=$1 left=$((total - SECONDS))
    shift
    echo "== $name"
    if [ "$left" -lt 5 ]; then
        echo "== $name left out: $total seconds are over"
        failed=1
        return
    fi
    timeout --kill-after=5 "$((left < limit ? left : limit))" "$@" 2>&1 | tee "$out/$name.txt"
    local code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        echo "== $name failed with code $code"
        failed=1
    fi
}

benchmark() {  # NAME RECIPE BATCH FLAGS...
    local name=$1 recipe=$2 batch=$3
    shift 3
    # shellcheck disable=SC2086  # a size is two words, the rounds are two or none
    run "$name" "$python" -m cascade_rcnn benchmark --config "$recipe" --size $size --batch "$batch" \
        --device "$device" $rounds --out "$out/$name.json" "$@"
}

# What matters most comes first: the time of a slow machine ends with the last parts.
for batch in $batches; do
    # shellcheck disable=SC2086  # no compilation: no word
    benchmark "predict_boxes_batch$batch" "$boxes" "$batch" $compile
done
benchmark "train_boxes_batch$train_batch" "$boxes" "$train_batch" --train
benchmark "predict_masks_batch1" "$masks" 1
[ "$device" = cpu ] || [ -z "$tests" ] || run kernel_tests "$python" -m pytest -q -m gpu tests
benchmark "train_masks_batch$train_batch" "$masks" "$train_batch" --train
# shellcheck disable=SC2086
[ -z "$compile" ] || benchmark "train_boxes_batch${train_batch}_compiled" "$boxes" "$train_batch" --train $compile
"$python" benchmarks/table.py "$out" bash benchmarks/gpu.sh >"$out/results.md" || failed=1
echo
cat "$out/results.md"
exit "$failed"
