#!/usr/bin/env bash
# Evaluate on the GPUs of this machine, or of several (as dist_train.sh); every image is looked at once:
#     bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [--data DIR] [--split NAME] [--out metrics.json]
# A checkpoint holds its configuration, so CONFIG only says where the data lie unless --data does.
set -euo pipefail
if [ $# -lt 3 ]; then
    echo "usage: bash tools/dist_test.sh CONFIG CHECKPOINT GPUS [--data DIR] [--split NAME] [--out metrics.json]" >&2
    exit 2
fi
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
config=$1
checkpoint=$2
processes=$3
shift 3
case " $* " in
    *" --data "* | *" --data="*) ;;
    *)
        root="$(PYTHONPATH="$here/..:${PYTHONPATH:-}" python3 -c \
            'import sys; from cascade_rcnn.recipes import load_config; print(load_config(sys.argv[1]).data.root)' "$config")"
        if [ -z "$root" ]; then
            echo "error: $config names no data: add --data DIR" >&2
            exit 2
        fi
        set -- --data "$root" "$@"
        ;;
esac
exec bash "$here/launch.sh" "$processes" "$here/test.py" "$checkpoint" "$@"
