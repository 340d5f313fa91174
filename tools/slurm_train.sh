#!/usr/bin/env bash
# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
#
# Trains on a Slurm cluster.
#
#   [GPUS=8] [GPUS_PER_NODE=8] [CPUS_PER_TASK=5] [SRUN_ARGS=...] \
#       bash tools/slurm_train.sh PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]
#
# GPUS is the number of processes in all; GPUS_PER_NODE=0 trains on CPUs.
set -euo pipefail
source "$(dirname "$0")/launchers.sh"

need 4 $# 'PARTITION JOB_NAME CONFIG WORK_DIR [arguments of tools/train.py]'
PARTITION=$1
JOB_NAME=$2
CONFIG=$3
WORK_DIR=$4
shift 4
submit "$PARTITION" "$JOB_NAME" train.py "$CONFIG" --work-dir "$WORK_DIR" --launcher slurm "$@"
