# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""`dev/gpu/contact.py` with a Python that only pretends: order, limits, summary, exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'dev' / 'gpu' / 'contact.py'
# notes its arguments; fails or hangs where they contain a word
PYTHON = '''#!/bin/bash
echo "fast=$MMDCNV4_FAST ${*//$'\\n'/ }" >> "$CALLS"
case "$*" in
  *${HANGING:-nothing}*) echo 'waits'; sleep 60 ;;
  *${FAILING:-nothing}*) echo 'an illegal memory access'; exit 3 ;;
esac
echo 'it went well'
'''
TOOL = '''#!/bin/bash
echo "$(basename "$0") $*" >> "$CALLS"; echo "$(basename "$0") is done"
'''

pytestmark = pytest.mark.skipif(os.name == 'nt', reason='needs bash')


@pytest.fixture
def run(tmp_path):
    for name, text in (('python', PYTHON), ('ncu', TOOL), ('compute-sanitizer', TOOL),
                       ('nvidia-smi', TOOL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*arguments, tools=True, **changes):
        path = f'{tmp_path}:/usr/bin:/bin' if tools else '/usr/bin:/bin'
        if not tools:
            (tmp_path / 'ncu').unlink(missing_ok=True)
            (tmp_path / 'compute-sanitizer').unlink(missing_ok=True)
        calls = tmp_path / 'calls'
        calls.touch()
        command = [sys.executable, str(SCRIPT), '--python', str(tmp_path / 'python'), '--out',
                   str(tmp_path / 'out'), *arguments]
        environment = {**os.environ, 'CALLS': str(calls), 'PATH': path, **changes}
        result = subprocess.run(command, env=environment, capture_output=True, text=True,
                                timeout=60)
        summary = (tmp_path / 'out' / 'summary.txt').read_text()
        return result, summary, calls.read_text().splitlines()
    return run


def test_all_is_well(run, tmp_path):
    result, summary, calls = run()
    assert result.returncode == 0, result.stderr
    assert 'FAILED' not in summary and 'not run' not in summary
    assert summary.splitlines()[-1].startswith('all is well')
    words = ('nvidia-smi', 'import os, sys, torch', 'build_info', 'info --check', 'official',
             '--dtypes float32',
             'ncu --clock-control none', 'test_dcnv4_gpu', '--tool memcheck', '--tool racecheck')
    found = [next(i for i, call in enumerate(calls) if word in call) for word in words]
    assert found == sorted(found)
    assert [call for call in calls if 'fast=1' in call] == \
        [call for call in calls if 'not elements' in call] and len(found) == len(words)
    assert 'it went well' in (tmp_path / 'out' / 'smoke.log').read_text()


def test_a_crash_leaves_the_others_their_evidence(run):
    result, summary, calls = run(FAILING='official')
    assert result.returncode == 1
    assert 'FAILED   bench-released' in summary and 'an illegal memory access' in summary
    assert 'ok       bench ' in summary and any('--tool racecheck' in call for call in calls)


@pytest.mark.parametrize('failing', ['import os, sys, torch', 'build_info'])
def test_without_gpu_or_kernels_nothing_else_runs(run, failing):
    result, summary, calls = run('--steps', 'smoke', FAILING=failing, CUDA_HOME='/nowhere')
    assert result.returncode == 1 and 'not run  everything else' in summary
    assert not any('--check' in call for call in calls)


def test_a_step_that_hangs_is_stopped(run):
    result, summary, _ = run('--steps', 'smoke', '--budget', '14', HANGING='--check')
    assert result.returncode == 1 and 'FAILED (stopped after' in summary and 'waits' in summary


def test_without_time_a_step_is_not_run(run):
    result, summary, calls = run('--budget', '3')
    assert result.returncode == 1 and 'not run  environment: no time left' in summary


def test_without_the_tools_of_nvidia(run):
    result, summary, _ = run('--steps', 'profile', 'sanitizers', tools=False)
    assert result.returncode == 0
    assert 'not run  profile: ncu is not installed' in summary
    assert 'not run  sanitizers: compute-sanitizer is not installed' in summary
