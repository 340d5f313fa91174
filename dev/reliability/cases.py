# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the scripts of this folder share: a bounded loop over seeded cases, and its report."""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable

import torch


def parser(description: str, cases: int) -> argparse.ArgumentParser:
    """The arguments that all campaigns have."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument('--cases', type=int, default=cases)
    result.add_argument('--seconds', type=float, default=3600, help='stop after this time')
    result.add_argument('--seed', type=int, default=0, help='number of the first case')
    return result


def run(name: str, case: Callable[[random.Random], str], args: argparse.Namespace) -> int:
    """Runs cases until their number or the time is reached.

    Args:
        name: for the report.
        case: of one generator; returns the kind of the case, raises AssertionError on a fault.
        args: of :func:`parser`.

    Returns:
        The number of faults. Each is printed with its seed: `--seed N --cases 1` repeats it.
    """
    torch.set_num_threads(1)
    start, kinds, faults, done = time.monotonic(), Counter(), 0, 0
    for seed in range(args.seed, args.seed + args.cases):
        if time.monotonic() - start > args.seconds:
            break
        torch.manual_seed(seed)
        try:
            kinds[case(random.Random(seed))] += 1
        except Exception:
            faults += 1
            print(f'{name}: FAULT in case {seed}', file=sys.stderr)
            traceback.print_exc()
        done += 1
        if done % 1000 == 0:
            print(f'{name}: {done} cases, {faults} faults, {time.monotonic() - start:.0f} s',
                  flush=True)
    print(f'{name}: {done} cases, {faults} faults, {time.monotonic() - start:.0f} s; torch '
          f'{torch.__version__}')
    for kind, count in sorted(kinds.items()):
        print(f'  {kind}: {count}')
    return faults
