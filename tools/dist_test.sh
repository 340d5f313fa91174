#!/usr/bin/env bash
# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
#
# Tests with several processes: on GPUs (nccl), or on the CPU where there are none (gloo).
#
#   bash tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [arguments of tools/test.py]
#
# On several machines run it on each one, with NNODES, NODE_RANK (0, 1, ...), MASTER_ADDR (that of
# machine 0) and PORT set. OMP_NUM_THREADS sets the threads of each process.
set -euo pipefail
source "$(dirname "$0")/launchers.sh"

need 3 $# 'CONFIG CHECKPOINT PROCESSES [arguments of tools/test.py]'
CONFIG=$1
CHECKPOINT=$2
PROCESSES=$3
shift 3
distribute "$PROCESSES" test.py "$CONFIG" "$CHECKPOINT" --launcher pytorch "$@"
