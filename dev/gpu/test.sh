#!/usr/bin/env bash
# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
#
# Builds the extension for the GPU of this machine and tests the kernels on it: `make test-gpu`.
# Needs a CUDA build of torch, nvcc, a C++ compiler, pytest and numpy; no OpenMMLab package and no
# network. Fails, rather than skips, where there is no GPU. Ends within eight minutes: a part that
# takes longer than its share is stopped and has failed. The summary comes last.
#
# Usage: dev/gpu/test.sh [python]
# Environment: as dev/gpu/build.sh; SANITIZER (default: 'memcheck racecheck'; '' for none)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} # of the reference: many small computations
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # those of other packages
unset MMDCNV4_FAST MMDCNV4_BACKEND
summary=()

step() { # seconds, name, command...
  local limit=$1 name=$2 started=$SECONDS left=$((460 - SECONDS)) code=0
  shift 2
  echo "== $name"
  if ((limit > left)); then limit=$((left > 1 ? left : 1)); fi
  timeout --kill-after=10 "$limit" "$@" || code=$?
  case $code in
    0) summary+=("ok      $name ($((SECONDS - started)) s)") ;;
    124 | 137) summary+=("FAILED  $name: stopped after $limit s") ;;
    *) summary+=("FAILED  $name ($((SECONDS - started)) s)") ;;
  esac
  echo "${summary[-1]}"
  return $code
}

finish() {
  printf '\n== summary\n'
  printf '%s\n' "${summary[@]}" "$SECONDS s in all; $device"
  ! printf '%s\n' "${summary[@]}" | grep -q '^FAILED'
}

tests() { # seconds, name, arguments of pytest...
  step "$1" "$2" "$python" -m pytest -q --tb=short --maxfail=20 -p no:cacheprovider "${@:3}" || true
}

# Small calls of all kernels under each tool. Only our kernels are watched, since those of torch are
# not ours to mend; every allocation is one of its own, so that its end is seen.
sanitize() { # tool
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step 110 "compute-sanitizer $1" "$sanitizer" --tool "$1" \
    --kernel-name kns=dcnv4 --report-api-errors no --launch-timeout 100 --print-limit 20 \
    --error-exitcode 9 "$python" -m pytest -q -x --tb=short -p no:cacheprovider -m ragged \
    tests/cuda/test_dcnv4_gpu.py tests/cuda/test_fast_gpu.py tests/cuda/test_gpu_behaviour.py ||
    true
}

device=$("$python" - << 'PYTHON'
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f'test_gpu: torch {torch.__version__} sees no GPU')
print(torch.cuda.get_device_name(), 'of compute capability',
      '{}.{}, torch'.format(*torch.cuda.get_device_capability()), torch.__version__)
PYTHON
)
echo "$device"
step 170 build bash dev/gpu/build.sh "$python" || { finish; exit 1; }
step 60 'the extension has CUDA kernels' "$python" -c "
from mmdcnv4.ops import _extension
assert 'cuda' in _extension.build_info, (_extension.missing_reason, _extension.build_info)
print(_extension.build_info['cuda'])" || { finish; exit 1; }

# a process for each part: after an illegal access nothing works any more in the one that made it
tests 120 'kernels against the reference' tests/cuda/test_dcnv4_gpu.py
tests 120 'kernels on tensor cores against the reference' tests/cuda/test_fast_gpu.py
MMDCNV4_FAST=1 tests 120 'the same choice by MMDCNV4_FAST=1' tests/cuda/test_dcnv4_gpu.py \
  -k 'not elements and not large and not f64'
tests 170 'streams, graphs, autocast, compile, determinism' tests/cuda/test_gpu_behaviour.py \
  -k 'not training'
tests 60 'training' tests/cuda/test_gpu_behaviour.py -k training

sanitizer=$(PATH=$PATH:/usr/local/cuda/bin command -v compute-sanitizer || true)
why='it is not installed'
if [ -n "$sanitizer" ] && ! timeout 60 "$sanitizer" --report-api-errors no --error-exitcode 9 \
  "$python" -c 'import torch; torch.ones(1, device="cuda").sum().item()' > .build/sanitizer.log 2>&1
then
  why='it does not work on this device' sanitizer=
  tail -5 .build/sanitizer.log
fi
for tool in ${SANITIZER-memcheck racecheck}; do
  if [ -n "$sanitizer" ]; then
    sanitize "$tool"
  else
    summary+=("not run compute-sanitizer $tool: $why")
  fi
done
finish
