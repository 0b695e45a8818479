#!/usr/bin/env bash
# torchrun as dist_train.sh and dist_test.sh need it: bash tools/launch.sh PROCESSES SCRIPT [ARGUMENTS ...]
set -euo pipefail
processes=$1
shift
nodes=${NNODES:-1}
options=(--nproc-per-node "$processes" --max-restarts "${MAX_RESTARTS:-0}")
if [ "$nodes" = 1 ]; then
    options+=(--standalone)
elif [[ "$nodes" == *:* ]]; then
    options+=(--nnodes "$nodes" --rdzv-backend c10d --rdzv-id "${JOB_ID:-cascade-rcnn}"
              --rdzv-endpoint "${MASTER_ADDR:?name the first machine}:${PORT:-29500}")
else
    options+=(--nnodes "$nodes" --node-rank "${NODE_RANK:?the number of this machine, 0 to $((nodes - 1))}"
              --master-addr "${MASTER_ADDR:?name the first machine}" --master-port "${PORT:-29500}")
fi
# The store of one start must not be seen by the next: it holds addresses of processes that have died.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    export OMP_NUM_THREADS=$((cores > processes ? cores / processes : 1))
fi
exec python3 -m torch.distributed.run "${options[@]}" "$@"
