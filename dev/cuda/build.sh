#!/usr/bin/env bash
# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
#
# Builds and links the whole extension with its CUDA kernels, on a machine with nvcc but without a
# GPU, and imports it: `make cuda-build`. Nothing runs on a GPU here. The build is made in a
# virtual environment of its own, against a CUDA build of torch (a download of about 2 GB).
#
# Usage: dev/cuda/build.sh [python] [venv]
#   python  interpreter for a new environment (default: python3.12)
#   venv    where it is or will be (default: .build/cuda-venv)
# Environment: TORCH_CUDA_ARCH_LIST (default: every architecture that nvcc knows), MAX_JOBS,
#   TORCH_VERSION (default: 2.11.0)
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-python3.12}
venv=$(realpath -m "${2:-.build/cuda-venv}")
torch_version=${TORCH_VERSION:-2.11.0}

if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv"
  "$venv/bin/pip" install --quiet --upgrade pip wheel 'setuptools<81' ninja numpy
fi
if ! "$venv/bin/python" -c 'import torch' 2> /dev/null; then
  "$venv/bin/pip" install "torch==$torch_version"
fi

source dev/cuda/toolkit.sh "$venv/bin/python"

started=$(date +%s)
build=.build/cuda
MMDCNV4_CUDA=1 "$venv/bin/python" setup.py --quiet build_ext --build-temp "$build/objects" \
  --build-lib "$build/lib"
seconds=$(($(date +%s) - started))

# import it beside the Python sources, away from a CPU build of this folder
rm -rf "$build/check"
mkdir -p "$build/check/mmdcnv4"
cp -r mmdcnv4/*.py mmdcnv4/ops "$build/check/mmdcnv4/"
cp "$build"/lib/mmdcnv4/_C*.so "$build/check/mmdcnv4/"
(cd "$build/check" && "$venv/bin/python" - << 'PYTHON'
import torch

import mmdcnv4.ops
from mmdcnv4.ops import _extension

assert _extension.is_available, _extension.missing_reason
assert 'cuda' in _extension.build_info, _extension.build_info
value, offset_mask = torch.randn(2, 5, 7, 64), torch.randn(2, 5, 7, 112)
options = dict(kernel_size=3, groups=4, padding=1)
ours = mmdcnv4.ops.dcnv4(value, offset_mask, backend='native', **options)
assert torch.allclose(ours, mmdcnv4.ops.dcnv4_reference(value, offset_mask, **options), atol=1e-5)
for name in ('dcnv4', '_dcnv4_backward', 'ms_deform_attn', '_ms_deform_attn_backward'):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f'mmdcnv4::{name}', 'CUDA'), name
print('torch', torch.__version__, '-', _extension.build_info['cuda'])
PYTHON
)
library=$(echo "$build"/check/mmdcnv4/_C*.so)
size=$(stat -c %s "$library")
packed=$(gzip -9 -c "$library" | wc -c)
echo "built and linked in $seconds s with $(nvcc --version | sed -n 's/.*release \([0-9.]*\),.*/nvcc \1/p');" \
  "$size bytes, $packed compressed; the CUDA kernels have NOT run: this takes a GPU"
