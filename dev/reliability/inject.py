# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Puts faults into a copy of the package and shows which tests turn red.

python dev/reliability/inject.py [--work-dir DIR]

The faults of the operator are put into its specification, which the kernels are compared with; a
test that cannot tell the two apart would stay green. Faults in the kernels themselves:
tests/cuda/mutations.py.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tests'))

from helpers.faults import Fault  # noqa: E402

REFERENCE, RANDOMNESS = 'mmdcnv4/ops/reference.py', 'mmdcnv4/engine/hooks/randomness.py'
OPERATOR = ('tests/ops/test_reference.py', 'tests/ops/test_dcnv4_backward.py')
RUNS = ('tests/engine/hooks/test_safe_runs.py',)


FAULTS = [
    Fault('x and y swapped', REFERENCE, '    x, y = sampling_positions(',
          '    y, x = sampling_positions(', OPERATOR),
    Fault('border off by one', REFERENCE, '(x > -1) & (x < width)', '(x > 0) & (x < width)',
          OPERATOR),
    Fault('no gradient of the mask', REFERENCE, '        mask = mask.softmax(dim=-1)\n',
          '        mask = mask.softmax(dim=-1)\n    mask = mask.detach()\n', OPERATOR),
    Fault('wrong stride of the groups', REFERENCE, 'groups, channels // groups).transpose(1, 2)',
          'channels // groups, groups).transpose(2, 3).transpose(1, 2)', OPERATOR),
    Fault('last channel dropped', REFERENCE, '    out = (weight.unsqueeze(-1) * sample).sum(dim=4)',
          '    sample = torch.cat([sample[..., :-1], sample[..., -1:] * 0], -1)\n'
          '    out = (weight.unsqueeze(-1) * sample).sum(dim=4)', OPERATOR),
    Fault('resumed in another order', RANDOMNESS, 'self._fetch.epoch.fill_(runner.epoch)',
          'self._fetch.epoch.fill_(runner.epoch - runner._resume)', RUNS),
    Fault('seed of the checkpoint not taken', 'mmdcnv4/cli/checkpoints.py',
          '    if seed is not None:\n', '    if seed is None:\n', RUNS),
]


def red_tests(folder: Path, tests: tuple[str, ...]) -> list[str]:
    """The tests that fail in a copy of the checkout."""
    environment = {**os.environ, 'PYTHONPATH': str(folder), 'OMP_NUM_THREADS': '1',
                   'PYTHONDONTWRITEBYTECODE': '1'}
    done = subprocess.run([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', *tests],
                          cwd=folder, env=environment, text=True, stdout=subprocess.PIPE)
    if done.returncode not in (0, 1):
        raise RuntimeError(f'pytest ended with {done.returncode}: {done.stdout[-2000:]}')
    return re.findall(r'^(?:FAILED|ERROR) (\S+)', done.stdout, re.MULTILINE)


def main() -> int:
    """Injects every fault; 0 if each turns a test red and none is red without."""
    arguments = argparse.ArgumentParser(description='Injected faults.')
    arguments.add_argument('--work-dir', type=Path, default=Path('work_dirs/inject'))
    arguments.add_argument('--only', default='', help='part of the name of the faults')
    args = arguments.parse_args()
    folder = args.work_dir.resolve()
    faults = [fault for fault in FAULTS if args.only in fault.name]
    missed = []
    for name in ('mmdcnv4', 'tests', 'tools', 'pyproject.toml'):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, dirs_exist_ok=True)
        else:
            shutil.copy(source, folder / name)
    if red := red_tests(folder, (*OPERATOR, *RUNS)):
        print(f'red without a fault: {red}')
        return 1
    for fault in faults:
        before = fault.put_into(folder)
        red = red_tests(folder, fault.tests)
        (folder / fault.file).write_text(before)
        missed += [] if red else [fault.name]
        print(f'{fault.name}: {len(red)} red, e.g. {", ".join(red[:2])}', flush=True)
    print(f'{len(faults) - len(missed)} of {len(faults)} faults found; missed: {missed}')
    return min(len(missed), 1)


if __name__ == '__main__':
    sys.exit(main())
