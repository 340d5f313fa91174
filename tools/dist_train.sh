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
source "$(dirname "$0")/launchers.sh"

need 2 $# 'CONFIG PROCESSES [arguments of tools/train.py]'
CONFIG=$1
PROCESSES=$2
shift 2
distribute "$PROCESSES" train.py "$CONFIG" --launcher pytorch "$@"
