# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of the kernels: no stack, no spills, registers for full occupancy, wide loads."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BUDGET = 100  # kernels per architecture


@pytest.mark.skipif(shutil.which('nvcc') is None, reason='nvcc is not installed')
@pytest.mark.parametrize('arch', ['90', *(pytest.param(arch, marks=pytest.mark.slow)
                                         for arch in ('75', '80', '86', '89', '100', '120'))])
def test_compiled_kernels(arch):
    program = ROOT / 'dev' / 'cuda' / 'check_ptxas.py'
    result = subprocess.run([sys.executable, program, '--arch', arch],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    count = int(result.stdout.splitlines()[-2].split()[0])
    assert 20 < count <= BUDGET
