#!/usr/bin/env bash
# Train under Slurm, from the checkout:
#     sbatch --nodes 4 --gpus-per-node 8 tools/slurm_train.sh CONFIG --out RUN [--data DIR] [--key.sub value ...]
# A job that is pre-empted, or has two minutes of its time left, saves, is queued again and goes on where it was.
#SBATCH --job-name=cascade-rcnn
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
set -euo pipefail
if [ $# -lt 1 ]; then
    echo "usage: sbatch --nodes N --gpus-per-node G tools/slurm_train.sh CONFIG --out RUN [...]" >&2
    exit 2
fi
cd "${SLURM_SUBMIT_DIR:-$PWD}" # Slurm runs a copy of this file from a folder of its own
gpus=${SLURM_GPUS_ON_NODE:-${GPUS:?number of GPUs per machine}}
MASTER_ADDR="$(scontrol show hostnames "${SLURM_JOB_NODELIST:?start this with sbatch}" | head -n 1)"
export MASTER_ADDR NNODES="$SLURM_NNODES" PORT="${PORT:-$((20000 + SLURM_JOB_ID % 20000))}"
stopped=no
# --resume begins a run where there is none, so that the same line serves the first start and every other
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash tools/dist_train.sh "$0" "$@"' \
    "$1" "$gpus" --resume "${@:2}" &
step=$!
trap 'stopped=yes; kill -TERM "$step"' TERM
code=0
wait "$step" || code=$?
if [ "$stopped" = yes ]; then
    wait "$step" || code=$? # the first wait ended with the signal, the training a few seconds later
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
