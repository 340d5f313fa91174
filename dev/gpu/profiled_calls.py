# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""One forward and backward call of each candidate between cudaProfilerStart and Stop, for ncu.

    ncu --profile-from-start off ... python dev/gpu/profiled_calls.py
    python dev/gpu/profiled_calls.py --table raw.csv     what `ncu --page raw --csv` says, short
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parents[2]
CANDIDATES = ('ours', 'ours fast', 'official')
# column of the table, metric of ncu, factor
METRICS = (('us', 'gpu__time_duration.sum', 1), ('warp instructions', 'smsp__inst_executed.sum', 1),
           ('registers', 'launch__registers_per_thread', 1),
           ('shared wavefronts', 'l1tex__data_pipe_lsu_wavefronts_mem_shared.sum', 1),
           ('warps active %', 'sm__warps_active.avg.pct_of_peak_sustained_active', 1),
           ('issue active %', 'smsp__issue_active.avg.pct_of_peak_sustained_active', 1),
           ('DRAM read MB', 'dram__bytes_read.sum', 1), ('written MB', 'dram__bytes_write.sum', 1),
           ('waves', 'launch__waves_per_multiprocessor', 1))
UNITS = {'ns': 1e-3, 'us': 1, 'ms': 1e3, 's': 1e6, 'nsecond': 1e-3, 'usecond': 1, 'msecond': 1e3,
         'byte': 1e-6, 'Kbyte': 1e-3, 'Mbyte': 1, 'Gbyte': 1e3}


def run(shape: tuple[int, int, int, int], group_channels: int, offsets: str) -> None:
    """Runs every candidate twice; the second time with the profiler on."""
    sys.path.insert(0, str(ROOT / 'benchmarks'))
    import torch
    from gpu_peers import PEERS, absent, make_problem
    problem = make_problem(shape, group_channels, torch.float16, offsets)
    grad = torch.randn_like(problem.value)
    calls = [PEERS[name].make(problem) for name in CANDIDATES if not absent(name)]
    for is_profiled in (False, True):
        if is_profiled:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        for call in calls:
            call.prepare()
            torch.autograd.grad(call.run(), call.leaves, grad)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def table(path: Path) -> list[str]:
    """Lines of a Markdown table, a launch each."""
    rows = [row for row in csv.reader(path.read_text().splitlines()) if len(row) > 100]
    names, units, launches = rows[0], rows[1], rows[2:]
    stalls = {name.split('issue_stalled_')[1].split('_per')[0]: i for i, name in enumerate(names)
              if 'issue_stalled_' in name and name.endswith('ratio') and 'not_issued' not in name}
    lines = ['| kernel | ' + ' | '.join(column for column, *_ in METRICS) + ' | stalls per issue |',
             '| --- |' + ' --- |' * (len(METRICS) + 1)]
    for row in launches:
        kernel = row[names.index('Kernel Name')].split('<')[0].split('::')[-1].removeprefix('void ')
        cells = []
        for _, metric, factor in METRICS:
            i = names.index(metric)
            value = float(row[i].replace(',', '')) * factor * UNITS.get(units[i], 1)
            cells.append(f'{value:.4g}' if value < 1e5 else f'{value:.0f}')
        longest = sorted(((float(row[i] or 0), name) for name, i in stalls.items()
                          if name != 'selected'), reverse=True)[:4]
        lines.append(f'| {kernel} | ' + ' | '.join(cells) + ' | '
                     + ', '.join(f'{name} {value:.2f}' for value, name in longest) + ' |')
    return lines


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shape', default='64x56x56x128')
    parser.add_argument('--group-channels', type=int, default=32)
    parser.add_argument('--offsets', default='D1')
    parser.add_argument('--table', type=Path, metavar='CSV')
    args = parser.parse_args(argv)
    if args.table is not None:
        print('\n'.join(table(args.table)))
    else:
        batch, height, width, channels = map(int, args.shape.split('x'))
        run((batch, height, width, channels), args.group_channels, args.offsets)
    return 0


if __name__ == '__main__':
    sys.exit(main())
