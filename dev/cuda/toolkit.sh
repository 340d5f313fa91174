# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
#
# Sourced by the scripts that compile CUDA: `source dev/cuda/toolkit.sh PYTHON`. Finds the toolkit
# (CUDA_HOME) and, for what it came without, the headers of the nvidia packages that PYTHON has
# beside torch (CPATH).

if [ -z "${CUDA_HOME:-}" ]; then
  # nvcc on the path may be a wrapper: ask it where it really is
  compiler=$(command -v nvcc || ls /usr/local/cuda/bin/nvcc 2> /dev/null) ||
    { echo "$(basename "$0"): nvcc is not installed; a CUDA toolkit is needed" >&2; exit 1; }
  folder=$("$compiler" --dryrun -x cu /dev/null 2>&1 | sed -n 's/^#\$ _HERE_=//p')
  CUDA_HOME=$(dirname "${folder:-$(dirname "$compiler")}")
fi
export CUDA_HOME
export PATH=$CUDA_HOME/bin:$PATH

for folder in $("$1" - << 'PYTHON'
import glob
import os

import torch

site = os.path.dirname(os.path.dirname(torch.__file__))
print(*sorted(glob.glob(site + '/nvidia/cu1*/include') + glob.glob(site + '/nvidia/*/include')))
PYTHON
); do
  case ":${CPATH:-}:" in *":$folder:"*) ;; *) CPATH=${CPATH:+$CPATH:}$folder ;; esac
done
export CPATH
