#!/usr/bin/env bash
# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
#
# Builds the extension in place, with CUDA kernels for the GPU of this machine alone; a step of
# `make test-gpu` and `make bench-gpu`. Says little: the log is in .build/gpu.log.
#
# Usage: dev/gpu/build.sh [python]
# Environment: MAX_JOBS; TORCH_CUDA_ARCH_LIST (default: the GPU at hand)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}
source dev/cuda/toolkit.sh "$python"
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c "
import sys, torch
if not torch.cuda.is_available():
    sys.exit(f'build_gpu: torch {torch.__version__} sees no GPU')
print('{}.{}'.format(*torch.cuda.get_device_capability()))")}
export TORCH_CUDA_ARCH_LIST MAX_JOBS=${MAX_JOBS:-$(nproc)}
# line numbers for sanitizers and profilers
export MMDCNV4_CUDA=1 MMDCNV4_LINEINFO=1
mkdir -p .build
"$python" setup.py --quiet build_ext --inplace --build-temp .build/gpu > .build/gpu.log 2>&1 ||
  { tail -60 .build/gpu.log; exit 1; }
