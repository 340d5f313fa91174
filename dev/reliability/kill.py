# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Kills a training at random moments, resumes it, and compares the final weights bit by bit.

python dev/reliability/kill.py [--cases 50] [--seconds 3600] [--work-dir DIR]

Each case kills (`kill -9`) a training of tests/helpers/tiny_run.py some time after it has started,
every third one while a checkpoint is being written, resumes with `tools/train.py --resume`, and
compares weights, moving averages and the state of the optimizer with the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tests'))

from helpers.tiny_run import same_bits, write_config  # noqa: E402
from mmdcnv4.cli.checkpoints import (  # noqa: E402
    allow_mmengine_checkpoints,
    find_resumable_checkpoint,
)

KEPT = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
KINDS = [dict(), dict(workers=2, keep=1), dict(by_epoch=False, length=30, interval=4, keep=1)]


def start(config: Path, work_dir: Path, *options: str) -> subprocess.Popen:
    """Starts a training in a process group of its own."""
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': '-1',
                   'PYTHONPATH': f'{ROOT}{os.pathsep}{ROOT / "tests"}'}
    with open(work_dir.with_suffix('.log'), 'a') as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / 'tools/train.py'), str(config), '--work-dir',
             str(work_dir), *options], env=environment, stdout=log, stderr=log,
            start_new_session=True)


def final(work_dir: Path) -> dict:
    """What the last checkpoint holds."""
    file = find_resumable_checkpoint(str(work_dir))
    assert file is not None, f'{work_dir} holds no whole checkpoint'
    return torch.load(file, weights_only=True)


def kill(process: subprocess.Popen, work_dir: Path, draw: random.Random, in_write: bool) -> str:
    """Ends it at a random moment of its training; returns which."""
    deadline, log = time.monotonic() + 300, work_dir.with_suffix('.log')
    while process.poll() is None and time.monotonic() < deadline and \
            'Checkpoints will be saved' not in log.read_text():
        time.sleep(0.05)
    moment = 'between'
    if in_write:
        skip = draw.randrange(3)  # files that may still be written
        seen: set[str] = set()
        while process.poll() is None and time.monotonic() < deadline:
            for partial in work_dir.glob('.*.partial'):
                seen.add(partial.name)
                moment = 'while writing'
            if len(seen) > skip:
                break
    else:
        time.sleep(draw.uniform(0, 3.5))
    if process.poll() is not None:
        return 'after the end'
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return moment


def one_case(folder: Path, seed: int, expected: list[dict], configs: list[Path]) -> dict:
    """Kills up to three times, then lets the run end; the result."""
    draw = random.Random(seed)
    kind = seed % len(configs)
    work_dir = folder / f'case-{seed}'
    options: list[str] = []
    moments = []
    for _ in range(draw.choice([1, 1, 2])):
        process = start(configs[kind], work_dir, *options)
        moments.append(kill(process, work_dir, draw, in_write=seed % 3 == 0 or draw.random() < 0.1))
        options = ['--resume']
    code = start(configs[kind], work_dir, *options).wait()
    found = final(work_dir)
    is_equal = code == 0 and found['meta']['iter'] == expected[kind]['meta']['iter'] and all(
        same_bits(found[key], expected[kind][key]) for key in KEPT)
    if is_equal:
        shutil.rmtree(work_dir)
    return dict(seed=seed, kind=kind, moments=moments, code=code, is_equal=is_equal)


def main() -> int:
    """Runs the cases until their number or the time is reached."""
    arguments = argparse.ArgumentParser(description='Kill and resume.')
    arguments.add_argument('--cases', type=int, default=50)
    arguments.add_argument('--seconds', type=float, default=3600)
    arguments.add_argument('--seed', type=int, default=0)
    arguments.add_argument('--work-dir', type=Path, default=Path('work_dirs/kill'))
    args = arguments.parse_args()
    begin = time.monotonic()
    folder = args.work_dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    allow_mmengine_checkpoints()
    configs = [write_config(folder / f'kind-{number}.py', **{
        'length': 5, 'seconds': 0.03, **kind}) for number, kind in enumerate(KINDS)]
    expected = []
    for number, config in enumerate(configs):
        whole = folder / f'whole-{number}'
        assert start(config, whole).wait() == 0, whole.with_suffix('.log').read_text()[-2000:]
        expected.append(final(whole))
    results = []
    for seed in range(args.seed, args.seed + args.cases):
        if time.monotonic() - begin > args.seconds:
            break
        results.append(one_case(folder, seed, expected, configs))
        print(json.dumps(results[-1]), flush=True)
    faults = sum(not result['is_equal'] for result in results)
    kills = [moment for result in results for moment in result['moments']
             if moment != 'after the end']
    print(f'kill: {len(kills)} kills in {len(results)} runs ({kills.count("while writing")} while '
          f'a checkpoint was written), {faults} runs that did not end with the same bits, '
          f'{time.monotonic() - begin:.0f} s')
    return faults


if __name__ == '__main__':
    sys.exit(min(main(), 1))
