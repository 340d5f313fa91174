# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""`dev/gpu/test.sh` with a Python that only pretends: its order, its summary, its exit code."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / 'dev' / 'gpu' / 'test.sh'
PYTHON = '''#!/bin/bash
case "$*" in
  -) case "$(cat)" in *is_available*)
       [ -n "$NO_GPU" ] && exit 1
       echo 'Some GPU of compute capability 9.0, torch 2.11' ;; esac ;;
  *get_device_capability*) echo 9.0 ;;
  *) echo "$TORCH_CUDA_ARCH_LIST fast=$MMDCNV4_FAST ${*//$'\\n'/ }" >> "$CALLS"
     case "$*" in *${FAILING:-nothing}*) echo 'it failed'; exit 3 ;; esac ;;
esac
'''
SANITIZER = '''#!/bin/bash
while [ "$1" != --error-exitcode ]; do shift; done
shift 2; exec "$@"
'''

pytestmark = pytest.mark.skipif(shutil.which('timeout') is None or os.name == 'nt',
                                reason='needs bash and timeout')


@pytest.fixture
def run(tmp_path):
    for name, text in (('python', PYTHON), ('compute-sanitizer', SANITIZER)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(**changes):
        environment = {**os.environ, 'CUDA_HOME': str(tmp_path), 'CALLS': str(tmp_path / 'calls'),
                       'PATH': f'{tmp_path}:{os.environ["PATH"]}', **changes}
        environment.pop('TORCH_CUDA_ARCH_LIST', None)
        result = subprocess.run(['bash', str(SCRIPT), str(tmp_path / 'python')],
                                env=environment, capture_output=True, text=True, timeout=60)
        calls = tmp_path / 'calls'
        return result, calls.read_text().splitlines() if calls.exists() else []
    return run


def test_all_is_well(run):
    result, calls = run()
    assert result.returncode == 0, result.stderr
    summary = result.stdout.split('== summary\n')[1].splitlines()
    assert len(summary) == 10 and all(line.startswith('ok ') for line in summary[:-1])
    assert summary[-1].endswith('s in all; Some GPU of compute capability 9.0, torch 2.11')
    assert calls[0].startswith('9.0 fast= setup.py') and len(calls) == 10
    assert [call for call in calls if 'fast=1' in call] == [calls[4]]
    assert sum('-m ragged' in call for call in calls) == 2


def test_a_failure_is_told_and_the_rest_runs(run):
    result, calls = run(FAILING='test_fast_gpu.py')
    assert result.returncode == 1 and len(calls) == 10
    assert 'FAILED  kernels on tensor cores' in result.stdout.split('== summary')[1]


@pytest.mark.parametrize('failing, count', [('setup.py', 1), ('_extension', 2)])
def test_without_kernels_nothing_is_tested(run, failing, count):
    result, calls = run(FAILING=failing)
    assert result.returncode == 1 and len(calls) == count and 'it failed' in result.stdout
    assert 'FAILED' in result.stdout.split('== summary')[1]


def test_without_a_gpu(run):
    result, calls = run(NO_GPU='1')
    assert result.returncode == 1 and calls == []


@pytest.mark.parametrize('changes, said', [
    (dict(SANITIZER=''), False), (dict(FAILING='import torch; torch.ones'), True)])
def test_without_a_sanitizer(run, changes, said):
    """It is left out, or it cannot watch this device."""
    result, calls = run(**changes)
    assert result.returncode == 0 and not any('ragged' in call for call in calls)
    assert ('not run compute-sanitizer racecheck: it does not work' in result.stdout) == said
