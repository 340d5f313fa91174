#!/usr/bin/env bash
# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
#
# Trains with several processes: on GPUs (nccl), or on the CPU where there are none (gloo).
#
#   bash tools/dist_train.sh CONFIG PROCESSES [arguments of tools/train.py]
#
# On several machines run it on each one, with NNODES, NODE_RANK (0, 1, ...), MASTER_ADDR (that of
# machine 0) and PORT set. OMP_NUM_THREADS sets the threads of each process.
set -euo pipefail

if [ $# -lt 2 ]; then
    echo "usage: bash $0 CONFIG PROCESSES [arguments of tools/train.py]" >&2
    exit 2
fi
CONFIG=$1
PROCESSES=$2
shift 2
TOOLS=$(cd "$(dirname "$0")" && pwd)

PYTHONPATH="$TOOLS/..${PYTHONPATH:+:$PYTHONPATH}" exec python -m torch.distributed.run \
    --nnodes="${NNODES:-1}" \
    --node_rank="${NODE_RANK:-0}" \
    --master_addr="${MASTER_ADDR:-127.0.0.1}" \
    --master_port="${PORT:-29500}" \
    --nproc_per_node="$PROCESSES" \
    "$TOOLS/train.py" "$CONFIG" --launcher pytorch "$@"
