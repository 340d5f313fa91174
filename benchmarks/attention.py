# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Times neighbourhood attention, forward and backward, and measures its memory on a CPU.

python benchmarks/attention.py --shape 1x100x160 --heads 2 --width 32

Compares the tiles of mmdcnv4 with the gather of every window, after checking that both give the
same result and the same gradients. Peak memory is the growth of the largest resident set (VmHWM of
Linux, set back before each run), in addition to the inputs.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import torch
from torch import Tensor

from mmdcnv4.models.layers.local_attention import (
    neighborhood_attention,
    neighborhood_attention_reference,
)

FORMS = dict(tiles=neighborhood_attention, gather=neighborhood_attention_reference)
PROC = Path('/proc/self')


def resident(key: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak) of this process."""
    status = (PROC / 'status').read_text()
    return 1024 * int(re.search(rf'{key}:\s*(\d+) kB', status)[1])


def run(form: str, inputs: Sequence[Tensor], kernel_size: int) -> list[Tensor]:
    """Result and gradients of the sum of its squares."""
    out = FORMS[form](*inputs, kernel_size)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), inputs)]


def measure(form: str, inputs: Sequence[Tensor], kernel_size: int,
            repeats: int) -> tuple[float, int]:
    """(median seconds, peak bytes) of forward and backward."""
    seconds, peaks = [], []
    for _ in range(repeats):
        ctypes.CDLL(None).malloc_trim(0)  # what is free would not count a second time
        (PROC / 'clear_refs').write_text('5')  # sets VmHWM back to VmRSS
        before, start = resident('VmRSS'), time.perf_counter()
        run(form, inputs, kernel_size)
        seconds.append(time.perf_counter() - start)
        peaks.append(resident('VmHWM') - before)
    return statistics.median(seconds), max(peaks)


def main(argv: Optional[Sequence[str]] = None) -> dict[str, tuple[float, int]]:
    """Checks, measures, and prints a row per form."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shape', default='1x100x160', help='images x rows x columns')
    parser.add_argument('--heads', type=int, default=2)
    parser.add_argument('--width', type=int, default=32, help='channels per head')
    parser.add_argument('--kernel-size', type=int, default=7)
    parser.add_argument('--repeats', type=int, default=3)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    shape = tuple(map(int, args.shape.split('x')))
    inputs = [torch.randn(*shape, args.heads, args.width, requires_grad=True) for _ in range(3)]
    side = 2 * args.kernel_size - 1
    inputs.append(torch.randn(args.heads, side, side, requires_grad=True))
    torch.testing.assert_close(*(run(form, inputs, args.kernel_size) for form in FORMS),
                               rtol=1e-3, atol=1e-3)
    print(f'neighbourhood attention {args.shape}, {args.heads} heads of {args.width}, forward and '
          f'backward, float32, {args.threads} threads, torch {torch.__version__}')
    rows = {}
    for form in FORMS:
        rows[form] = measure(form, inputs, args.kernel_size, args.repeats)
        print(f'{form:<8}{rows[form][0]:>8.3f} s   peak {rows[form][1] / 2**20:>7.0f} MiB')
    return rows


if __name__ == '__main__':
    main()
