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
import sys
import time
import traceback
from pathlib import Path
from typing import Optional

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / 'tests'))

from helpers.tiny_run import same_bits, write_config  # noqa: E402
from helpers.tool_runner import load_tool as tool  # noqa: E402
from mmdcnv4.cli.checkpoints import (  # noqa: E402
    allow_mmengine_checkpoints,
    find_resumable_checkpoint,
)

KEPT = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')
KINDS = [dict(), dict(workers=2, keep=1), dict(by_epoch=False, length=30, interval=4, keep=1)]


class Training:
    """A training in a process of its own, forked after the imports, which take most of a start."""

    def __init__(self, config: Path, work_dir: Path, *options: str) -> None:
        sys.stdout.flush()
        self.pid, self.code = os.fork(), None
        if self.pid:
            return
        status = 1
        try:
            os.setsid()  # its workers are killed with it
            log = os.open(work_dir.with_suffix('.log'), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            tool('train').main([str(config), '--work-dir', str(work_dir), *options])
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def poll(self) -> Optional[int]:
        """The exit status, None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float = 600) -> Optional[int]:
        """Waits for the end; None, after a kill, where it hangs."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                return None
            time.sleep(0.05)
        return self.code

    def kill(self) -> None:
        """`kill -9`, its workers included."""
        os.killpg(self.pid, signal.SIGKILL)
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def final(work_dir: Path) -> dict:
    """What the last checkpoint holds."""
    file = find_resumable_checkpoint(str(work_dir))
    assert file is not None, f'{work_dir} holds no whole checkpoint'
    return torch.load(file, weights_only=True)


def kill(process: Training, work_dir: Path, draw: random.Random, in_write: bool,
         runs: int) -> str:
    """Ends it at a random moment of its training; returns which."""
    deadline, log = time.monotonic() + 300, work_dir.with_suffix('.log')
    while process.poll() is None and time.monotonic() < deadline and \
            not (log.is_file() and log.read_text().count('Checkpoints will be saved') > runs):
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
    process.kill()
    return moment


def one_case(folder: Path, seed: int, expected: list[dict], configs: list[Path]) -> dict:
    """Kills up to three times, then lets the run end; the result."""
    draw = random.Random(seed)
    kind = seed % len(configs)
    work_dir = folder / f'case-{seed}'
    options: list[str] = []
    moments = []
    for _ in range(draw.choice([1, 1, 2])):
        process = Training(configs[kind], work_dir, *options)
        moments.append(kill(process, work_dir, draw, seed % 3 == 0 or draw.random() < 0.1,
                            len(moments)))
        options = ['--resume']
    code = Training(configs[kind], work_dir, *options).wait()
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
    torch.set_num_threads(1)
    allow_mmengine_checkpoints()
    configs = [write_config(folder / f'kind-{number}.py', **{
        'length': 5, 'seconds': 0.03, **kind}) for number, kind in enumerate(KINDS)]
    expected = []
    for number, config in enumerate(configs):
        whole = folder / f'whole-{number}'
        assert Training(config, whole).wait() == 0, whole.with_suffix('.log').read_text()[-2000:]
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
