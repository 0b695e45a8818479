#!/usr/bin/env bash
# Train on the GPUs of this machine, or of several:
#     bash tools/dist_train.sh CONFIG GPUS [--data DIR] [--out RUN] [--key.sub value ...]
#     NNODES=4 NODE_RANK=0 MASTER_ADDR=node0 PORT=29500 bash tools/dist_train.sh CONFIG 8 ...    (on each machine)
# MAX_RESTARTS=3 starts the group again when a process dies; training goes on from the last save.
# NNODES=2:4 lets machines come and go; it needs the same MASTER_ADDR and PORT everywhere and no NODE_RANK.
set -euo pipefail
if [ $# -lt 2 ]; then
    echo "usage: bash tools/dist_train.sh CONFIG GPUS [--data DIR] [--out RUN] [--key.sub value ...]" >&2
    exit 2
fi
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
config=$1
processes=$2
shift 2
exec bash "$here/launch.sh" "$processes" "$here/train.py" "$config" "$@"
