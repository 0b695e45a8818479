#!/usr/bin/env bash
# The whole GPU measurement in one call of under ten minutes: kernel tests, then prediction (batch 1 and 8) and training
# (batch 16, bfloat16) of the cascade and of the mask cascade, each beside torchvision's model in the same run.
#
#   bash benchmarks/gpu.sh [OUT]                        # on a machine with a GPU; OUT is a folder (benchmarks/results)
#   DEVICE=cpu SIZE="64 96" BATCHES=1 TRAIN_BATCH=1 COMPILE= LIMIT=600 bash benchmarks/gpu.sh /tmp/try   # try the script
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-benchmarks/results}
device=${DEVICE:-cuda}
size=${SIZE:-800 1088}
batches=${BATCHES:-1 8}
train_batch=${TRAIN_BATCH:-16}
compile=${COMPILE---compile}
boxes=${BOXES:-cascade_rcnn_r50_fpn_1x_coco}
masks=${MASKS:-cascade_mask_rcnn_r50_fpn_1x_coco}
limit=${LIMIT:-95}  # seconds for one measurement: one that hangs or compiles too long costs no more than itself
python=${PYTHON:-python3}
mkdir -p "$out"
failed=0

run() {  # NAME COMMAND...
    local name=$1
    shift
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    local code=${PIPESTATUS[0]}
    if [ "$code" -ne 0 ]; then
        echo "== $name failed with code $code"
        failed=1
    fi
}

benchmark() {  # NAME RECIPE BATCH FLAGS...
    local name=$1 recipe=$2 batch=$3
    shift 3
    # shellcheck disable=SC2086  # a size is two words
    run "$name" "$python" -m cascade_rcnn benchmark --config "$recipe" --size $size --batch "$batch" \
        --device "$device" --out "$out/$name.json" "$@"
}

if [ "$device" != cpu ]; then
    run kernel_tests "$python" -m pytest -q -m gpu tests
fi
for batch in $batches; do
    # shellcheck disable=SC2086  # no compilation: no word
    benchmark "predict_boxes_batch$batch" "$boxes" "$batch" $compile
done
benchmark "train_boxes_batch$train_batch" "$boxes" "$train_batch" --train
benchmark "predict_masks_batch1" "$masks" 1
# shellcheck disable=SC2086
[ -z "$compile" ] || benchmark "train_boxes_batch${train_batch}_compiled" "$boxes" "$train_batch" --train $compile
exit "$failed"
