#!/usr/bin/env bash
# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
#
# Builds the extension for the GPU of this machine and tests the kernels on it: `make test-gpu`.
# Needs a CUDA build of torch, nvcc, a C++ compiler, pytest and numpy; no OpenMMLab package and no
# network. Fails, rather than skips, where there is no GPU.
#
# Usage: tools/test_gpu.sh [python]
# Environment: MAX_JOBS; SANITIZER=0 leaves out compute-sanitizer
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-python3}
export PYTHONPATH=$PWD MAX_JOBS=${MAX_JOBS:-$(nproc)} MMDCNV4_CUDA=1
summary=()

step() { # name, command...
  local name=$1 started=$SECONDS
  shift
  echo "== $name"
  if "$@"; then
    summary+=("ok      $name ($((SECONDS - started)) s)")
  else
    summary+=("FAILED  $name ($((SECONDS - started)) s)")
  fi
}

finish() {
  echo
  echo '== summary'
  printf '%s\n' "${summary[@]}"
  ! printf '%s\n' "${summary[@]}" | grep -q FAILED
}

TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" - << 'PYTHON'
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f'test_gpu: torch {torch.__version__} sees no GPU')
print('{}.{}'.format(*torch.cuda.get_device_capability()))
PYTHON
)}
export TORCH_CUDA_ARCH_LIST

build() {
  "$python" setup.py --quiet build_ext --inplace --build-temp .build/gpu > .build/gpu.log 2>&1 ||
    { tail -40 .build/gpu.log; return 1; }
}

kernels() {
  "$python" -c "
import torch
from mmdcnv4.ops import _extension
assert 'cuda' in _extension.build_info, (_extension.missing_reason, _extension.build_info)
print(torch.cuda.get_device_name(), 'torch', torch.__version__, _extension.build_info['cuda'])"
}

# a few ragged calls under each tool; every allocation is one of its own, so that its end is seen
sanitizer() {
  local ragged='3x5x7 or 2x13x1 or 2x3x11 or 3x7x5 or 3x1x1 or 5x7x11'
  local sizes="(test_sizes or test_window_sizes) and ($ragged)"
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 9 \
    "$python" -m pytest -q -x -p no:cacheprovider tests/cuda/test_dcnv4_gpu.py \
    -k "$sizes and (f32 or f16)"
}

mkdir -p .build
step 'build' build
step 'the extension has CUDA kernels' kernels
step 'kernels against the reference' "$python" -m pytest -q -p no:cacheprovider \
  tests/cuda/test_dcnv4_gpu.py -k 'not test_training'
step 'training' "$python" -m pytest -q -p no:cacheprovider tests/cuda/test_dcnv4_gpu.py \
  -k test_training
if [ "${SANITIZER:-1}" = 1 ] && command -v compute-sanitizer > /dev/null; then
  step 'compute-sanitizer memcheck' sanitizer memcheck
  step 'compute-sanitizer racecheck' sanitizer racecheck
else
  summary+=('not run compute-sanitizer (absent, or SANITIZER=0)')
fi
finish
