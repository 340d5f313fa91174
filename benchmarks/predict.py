# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Predicts the device time of `dcnv4` on a GPU, and holds it against what was measured.

    python benchmarks/predict.py                   # ten shapes, float16, groups of 32 channels
    python benchmarks/predict.py --dtypes float32 --group-channels 16 --gpu a100
    python benchmarks/predict.py --rows --shapes 64x56x56x128      # waves, what bounds each kernel
    python benchmarks/predict.py --measured        # beside what benchmarks/results/ has

Needs no GPU and no nvcc. The time of a launch is that of an empty one and the longest of

    issue       warp instructions over the issue slots of the busiest multiprocessor
    chain       waves of blocks, each as long as the instructions of a warp, one after the other
    l1          wavefronts of shared memory and of gathered pixels, one per cycle
    l2          bytes that blocks fetch, each once per block
    dram        bytes of all tensors, each once
    reductions  sectors of 32 bytes that the direct gradients add to, in global memory

by the share of it that a good kernel sustains. Instructions come from csrc/cuda/compiled.md, blocks
from the launch plan of the extension, far taps from drawn offsets (far_taps.py). Constants marked
"assumed" in `Gpu` were measured by nobody here, and none was chosen to make a row fit. Where
predicted over measured is far from 1, the model lacks something.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import torch
from executions import Kernel, Launch, instructions, read_compiled, shared_wavefronts
from far_taps import (
    DISTRIBUTIONS,
    FORWARD_TILE,
    TAPS,
    WARP,
    existing_corners,
    far_rates,
    has_windows,
    pixels_per_row,
)
from gpu import DTYPES, SHAPES, parse_shape
from gpu_peers import Problem, offset_scale_of
from window_groups import Group

from mmdcnv4.ops import _extension, offset_mask_channels

RESULTS = Path(__file__).resolve().parent / 'results'
PATHS = {'direct': 'ours', 'tensor cores': 'ours fast'}  # and their names in results
DIRECTIONS = ('forward', 'backward')
CORNERS = 4 * TAPS
RARE = ('window_clear', 'window_grad_rest')  # leave at once unless far taps crowd


class Gpu(NamedTuple):
    """Constants of a device; where no source stands, the architecture's documentation has them."""

    name: str
    arch: str
    multiprocessors: int
    clock: float  # Hz; H200: seen under load (results/)
    copy: float  # bytes per second of a copy; H200: measured (results/), A100: assumed
    l2: float  # bytes per second; assumed
    reductions: float  # bytes of sectors per second; H200: from one row of results/, A100: assumed
    shared_bytes: int  # of a multiprocessor
    launch: float = 0.9e-6  # seconds of an empty one in a graph; H200: measured (results/)
    sustained: float = 0.70  # of a limit; assumed (the design's model of before any measurement)
    warp_cycles: float = 5.0  # between two instructions of a warp; assumed: counters say 5 to 9
    registers: int = 65536
    warps: int = 64


GPUS = {
    'h200': Gpu('H200', 'sm_90', 132, 1.98e9, 4.25e12, 5.5e12, 4.6e12, 228 * 1024),
    'a100': Gpu('A100-80G', 'sm_80', 108, 1.41e9, 1.75e12, 4.0e12, 1.7e12, 164 * 1024)}


class NotModelledError(ValueError):
    """A call of which something that takes time is not known."""


class Call(NamedTuple):
    """One problem, and which kernels take it."""

    shape: str
    depth: int
    dtype: str
    offsets: str
    direction: str
    path: str

    @property
    def group(self) -> Group:
        """Channels of a group."""
        return Group(self.depth, DTYPES[self.dtype].itemsize)

    @property
    def has_tensor_cores(self) -> bool:
        """Whether there are kernels on tensor cores for it: is_call_for_windows."""
        return has_windows(self.offsets) and (self.dtype != 'float32' or self.depth < 64)


class Terms(NamedTuple):
    """Seconds of a launch by what may bound it, each at its limit."""

    name: str
    issue: float
    chain: float
    l1: float
    l2: float
    dram: float
    reductions: float
    waves: float
    instructions: float

    @property
    def bounds(self) -> dict[str, float]:
        """Those of which the longest counts."""
        return {name: getattr(self, name)
                for name in ('issue', 'chain', 'l1', 'l2', 'dram', 'reductions')}

    @property
    def bound(self) -> str:
        """Name of the longest."""
        return max(self.bounds, key=self.bounds.__getitem__)


def problem_of(call: Call) -> Problem:
    """Its tensors, without memory."""
    shape, dtype = parse_shape(call.shape), DTYPES[call.dtype]
    groups = shape[3] // call.depth
    packed = offset_mask_channels(groups, TAPS)
    return Problem(torch.empty(shape, dtype=dtype, device='meta'),
                   torch.empty(*shape[:3], packed, dtype=dtype, device='meta'), groups,
                   offset_scale_of(call.offsets))


def plan_of(problem: Problem, name: str, *limits: int) -> dict:
    """A launch plan as the extension computes it."""
    if not _extension.is_available:
        raise SystemExit(f'predict.py: launch plans need the extension: '
                         f'{_extension.missing_reason}')
    return json.loads(getattr(torch.ops.mmdcnv4, name)(
        problem.value, problem.offset_mask, [3, 3], problem.groups, [1, 1], [1, 1], [1, 1],
        problem.offset_scale, False, False, *limits))


def blocks_of(problem: Problem, plan: dict) -> int:
    """Blocks of a launch."""
    return problem.value.shape[0] * plan['slices'] * plan['tiles_h'] * plan['tiles_w']


def held_blocks(gpu: Gpu, registers: int, threads: int, shared_bytes: int) -> int:
    """Blocks that a multiprocessor holds at a time."""
    warps = threads // WARP
    by_registers = gpu.registers // (-(-registers * WARP // 256) * 256 * warps)
    return max(1, min(gpu.warps // warps, 32, by_registers,
                      gpu.shared_bytes // (shared_bytes + 1024)))


class Work(NamedTuple):
    """What a launch moves, in bytes, and what it asks of L1, in wavefronts."""

    dram: float
    l2: float
    wavefronts: float
    reductions: float = 0.0


def terms_of(gpu: Gpu, kernel: Kernel, launch: Launch, shared_bytes: int, work: Work) -> Terms:
    """Times of a launch at each limit."""
    held = held_blocks(gpu, kernel.registers, launch.threads, shared_bytes)
    together = held * gpu.multiprocessors
    left = launch.blocks % together
    # blocks that the busiest multiprocessor takes, and what all would take if it were even
    busiest = launch.blocks // together * held + -(-left // gpu.multiprocessors)
    uneven = busiest * gpu.multiprocessors / launch.blocks
    count = instructions(kernel, launch)
    cycles = gpu.multiprocessors * gpu.clock
    chain = -(-launch.blocks // together) * count / launch.warps * gpu.warp_cycles / gpu.clock
    return Terms(launch.direction, issue=uneven * count / (4 * cycles), chain=chain,
                 l1=uneven * work.wavefronts / cycles, l2=work.l2 / gpu.l2,
                 dram=work.dram / gpu.copy, reductions=work.reductions / gpu.reductions,
                 waves=launch.blocks / together, instructions=count)


def moving(gpu: Gpu, name: str, moved: float) -> Terms:
    """A launch that only moves bytes, as well as a copy does."""
    return Terms(name, 0, 0, 0, 0, gpu.sustained * moved / gpu.copy, 0, 0, 0)


def direct_terms(gpu: Gpu, call: Call, table: dict) -> list[Terms]:
    """Launches of the direct kernels."""
    problem, is_backward = problem_of(call), call.direction == 'backward'
    plan = plan_of(problem, '_dcnv4_launch_plan', is_backward, gpu.multiprocessors)
    _, height, width, _ = problem.value.shape
    size, outputs = problem.value.element_size(), problem.value.numel()
    launch = Launch(call.direction, call.group, blocks_of(problem, plan), plan['threads'],
                    outputs // call.depth)
    fetched = pixels_per_row(height, width, call.offsets, plan['tile_h'], plan['tile_w'])
    moved = problem.bytes_moved_backward if is_backward else problem.bytes_moved
    gathered = CORNERS * outputs * size / 128
    coefficients = launch.rows * TAPS * (64 if is_backward else 32) * 2 / 128  # out and back
    # in whole sectors: groups of 8 channels and more are added together
    added = CORNERS * outputs * 4 * existing_corners(height, width, call.offsets)
    work = Work(moved, moved + (fetched - 1) * outputs * size, gathered + coefficients,
                added if is_backward else 0)
    kernel = table[call.direction, f'D={call.depth}', call.dtype, gpu.arch]
    terms = [terms_of(gpu, kernel, launch, plan['shared_bytes'], work)]
    if is_backward:  # float32 sums, cleared before and rounded after
        terms.insert(0, moving(gpu, 'fill', 4 * outputs))
        if size < 4:
            terms.append(moving(gpu, 'cast', (4 + size) * outputs))
    return terms


def window_launch(problem: Problem, call: Call, direction: str, plan: dict) -> Launch:
    """A launch of a kernel on tensor cores."""
    batch, height, width, _ = problem.value.shape
    owned = batch * -(-height // 4) * -(-width // 4) * problem.groups
    tile = (plan['tile_h'], plan['tile_w']) if direction == 'window_forward' else FORWARD_TILE
    return Launch(direction, call.group, blocks_of(problem, plan), plan['threads'],
                  problem.value.numel() // call.depth, plan['tile_h'], plan['tile_w'],
                  owned, far_rates(height, width, call.group, call.offsets, tile))


def window_work(problem: Problem, launch: Launch) -> Work:
    """What a kernel on tensor cores moves: each tensor once, cells per block, far taps."""
    size = problem.value.element_size()
    values, numbers = problem.value.numel() * size, problem.offset_mask.numel() * size
    rates, row = launch.rates, launch.group.depth * size
    cells = launch.blocks * launch.cells * 128
    wavefronts = shared_wavefronts(launch)
    if launch.direction == 'window_forward':
        far = 4 * rates.elsewhere * launch.rows * row
        moved, fetched = 2 * values + numbers, cells + values + numbers + far
        wavefronts += far / 128
    elif launch.direction == 'window_grad_offset':
        listed = 4 * rates.listed * launch.rows
        far = 5 * rates.takes * launch.rows * (WARP // launch.group.team) * row
        moved = 2 * values + 2 * numbers + listed
        fetched = cells + values + 2 * numbers + far + listed
    else:
        listed = rates.listed * launch.rows
        halo = launch.cells / (launch.tile_h * launch.tile_w)
        moved = 2 * values + numbers + 4 * listed
        fetched = cells + values + halo * numbers + listed * (4 + row)
    return Work(moved, fetched, wavefronts)


def window_terms(gpu: Gpu, call: Call, table: dict) -> list[Terms]:
    """Launches of the kernels on tensor cores."""
    problem = problem_of(call)
    plans = plan_of(problem, '_dcnv4_window_plans', gpu.multiprocessors,
                    gpu.shared_bytes - 1024)
    names = {'window_forward': 'offset_mask'} if call.direction == 'forward' else {
        'window_grad_offset': 'offset_mask', 'window_grad_value': 'value'}
    terms = []
    for name, plan in ((name, plans[of]) for name, of in names.items()):
        if not plan['is_made_for']:
            raise SystemExit(f'predict.py: no tensor-core kernels for {call} on {gpu.name}')
        launch = window_launch(problem, call, name, plan)
        if launch.rates.has_full and call.direction == 'backward':
            raise NotModelledError(f'{call} fills a list of far taps')
        terms.append(terms_of(gpu, table[name, f'D={call.depth}', call.dtype, gpu.arch], launch,
                              plan['shared_bytes'], window_work(problem, launch)))
    if call.direction == 'backward':
        terms.insert(0, moving(gpu, 'fill', 4 * launch.owned))  # counts of the lists
        for name, dtype in (('window_clear', 'float32'), ('window_grad_rest', call.dtype)):
            rare = Launch(name, call.group, plans['rest_blocks'], 256, launch.rows)
            terms.insert(2, terms_of(gpu, table[name, 'all widths', dtype, gpu.arch], rare, 0,
                                     Work(0, 0, 0)))
    return terms


def predict(gpu: Gpu, call: Call, table: dict) -> list[Terms]:
    """The launches of a call, in turn."""
    is_window = call.path != 'direct' and call.has_tensor_cores  # else the direct kernels take it
    return (window_terms if is_window else direct_terms)(gpu, call, table)


def seconds(gpu: Gpu, terms: Terms) -> float:
    """The time of a launch."""
    return gpu.launch + terms.bounds[terms.bound] / gpu.sustained


def floor_of(gpu: Gpu, call: Call) -> float:
    """Seconds in which the bytes of all tensors are moved once, at least an empty launch."""
    problem = problem_of(call)
    moved = problem.bytes_moved if call.direction == 'forward' else problem.bytes_moved_backward
    return max(moved / gpu.copy, gpu.launch)


def is_outdated(call: Call, measured_on: str) -> bool:
    """Whether the kernels that were measured on that day (YYYYMMDD) are no longer these."""
    is_of_halves = call.direction == 'backward' and call.dtype != 'float32'
    # until then the threads of direct kernels had eight channels, reductions filled half of the
    # sectors, and tensor cores took D3 and D4, with windows of 12x12 pixels
    is_direct = call.path == 'direct' or not has_windows(call.offsets)
    return is_direct and is_of_halves and measured_on <= '20261127'


def read_measured(gpu: Gpu, folder: Path = RESULTS) -> dict[Call, float]:
    """Seconds that gpu.py has measured on this device, in the newest run that has the call."""
    measured = {}
    for path in sorted(folder.glob('*.json')):  # their names end in date and time
        result = json.loads(path.read_text())
        if gpu.name not in result.get('device', ''):
            continue
        for row, (kind, peer) in itertools.product(result.get('rows', ()), PATHS.items()):
            time = row['peers'].get(peer, {}).get('device_ms', 0)
            call = Call(row['shape'], row['group_channels'], row['dtype'], row['offsets'],
                        row['direction'], kind)
            if time > 0 and not is_outdated(call, path.stem.split('-')[-2]):
                measured[call] = time / 1e3
    return measured


def predicted(gpu: Gpu, call: Call, table: dict) -> float:
    """Seconds of a call; NaN where they are not modelled."""
    try:
        launches = predict(gpu, call, table)
    except NotModelledError:
        return math.nan
    return sum(seconds(gpu, terms) for terms in launches)


HEAD = (f'{"shape":>14} {"D":>3} {"dtype":>8} {"":2} {"":8} {"kernels":12} {"instr.":>6} '
        f'{"waves":>11} {"floor":>7} {"us":>8} {"":4} {"measured":>8} {"ratio":>5}')


def lines_of(gpu: Gpu, call: Call, table: dict, measured: Optional[float]) -> list[str]:
    """A call: instructions for 256 outputs, waves, times, and what bounds each launch."""
    try:
        launches, floor = predict(gpu, call, table), floor_of(gpu, call)
    except NotModelledError as error:
        return [f'{call.shape:>14} not modelled: {error}']
    time = sum(seconds(gpu, terms) for terms in launches)
    waves = ' '.join(f'{t.waves:.2f}' for t in launches if t.waves > 0 and t.name not in RARE)
    count = sum(t.instructions for t in launches) * 256 / problem_of(call).value.numel()
    line = (f'{call.shape:>14} {call.depth:3} {call.dtype:>8} {call.offsets} {call.direction:8} '
            f'{call.path:12} {count:6.0f} {waves:>11} {1e6 * floor:7.1f} {1e6 * time:8.1f} '
            f'{100 * floor / time:3.0f}%')
    if measured is not None:
        line += f' {1e6 * measured:8.1f} {time / measured:5.2f}'
    return [line, *(
        f'{"":20}{t.name:18} {1e6 * seconds(gpu, t):7.1f} = {1e6 * gpu.launch:.1f} + '
        f'{t.bound} / {gpu.sustained:.2f}: '
        + ', '.join(f'{name} {1e6 * limit:.1f}' for name, limit in t.bounds.items() if limit > 0)
        for t in launches)]


def grid(gpu: Gpu, table: dict, args: argparse.Namespace) -> list[str]:
    """Markdown tables, for each type and direction: shapes by distributions; nan: not modelled."""
    lines = []
    for depth, dtype, direction in itertools.product(args.group_channels, args.dtypes, DIRECTIONS):
        columns = [(path, offsets) for path, offsets in itertools.product(PATHS, args.offsets)
                   if path == 'direct' or Call('', depth, dtype, offsets, direction,
                                               path).has_tensor_cores]
        lines += ['', f'{dtype}, groups of {depth} channels, {direction}', '',
                  '| shape | floor | ' + ' | '.join(' '.join(column) for column in columns) + ' |',
                  '| --- ' * (2 + len(columns)) + '|']
        for shape in args.shapes:
            calls = [Call(shape, depth, dtype, offsets, direction, path)
                     for path, offsets in columns]
            times = [floor_of(gpu, calls[0]), *(predicted(gpu, call, table) for call in calls)]
            lines.append(f'| {shape} | ' + ' | '.join(f'{1e6 * t:.1f}' for t in times) + ' |')
    return lines


def spread_lines(ratios: dict[Call, float]) -> list[str]:
    """How far off the model is, by kind of kernel and direction."""
    lines = []
    for path, direction in itertools.product(PATHS, DIRECTIONS):
        logs = [math.log(ratio) for call, ratio in ratios.items()
                if (call.path, call.direction) == (path, direction)]
        if logs:
            lines.append(f'{path}, {direction}: predicted / measured {math.exp(min(logs)):.2f} to '
                         f'{math.exp(max(logs)):.2f}, geometric mean '
                         f'{math.exp(sum(logs) / len(logs)):.2f}, {len(logs)} rows')
    return lines


def parse_arguments(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--gpu', choices=GPUS, default='h200')
    parser.add_argument('--shapes', nargs='+', default=SHAPES, metavar='NxHxWxC',
                        type=lambda text: 'x'.join(map(str, parse_shape(text))))
    parser.add_argument('--group-channels', nargs='+', type=int, choices=[16, 32, 64],
                        default=[32])
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES, default=['float16'])
    parser.add_argument('--offsets', nargs='+', choices=DISTRIBUTIONS, default=DISTRIBUTIONS)
    parser.add_argument('--rows', action='store_true',
                        help='a row for each call, with its launches')
    parser.add_argument('--measured', action='store_true',
                        help='the same for the calls that were measured, and no others')
    return parser.parse_args(argv)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Prints the tables."""
    args = parse_arguments(argv)
    gpu, table = GPUS[args.gpu], read_compiled()
    print(f'{gpu.name}: predicted us of device time; floor: all tensors once at the bandwidth of a '
          'copy')
    if not (args.rows or args.measured):
        print('\n'.join(grid(gpu, table, args)))
        return 0
    measured = read_measured(gpu)
    calls = list(measured)
    if not args.measured:
        calls = [Call(shape, depth, dtype, offsets, direction, path)
                 for depth, dtype, offsets, shape, direction, path in itertools.product(
                     args.group_channels, args.dtypes, args.offsets, args.shapes, DIRECTIONS,
                     PATHS)]
        calls = [call for call in calls if call.path == 'direct' or call.has_tensor_cores]
    print(HEAD)
    for call in calls:
        print('\n'.join(lines_of(gpu, call, table, measured.get(call))))
    ratios = {call: predicted(gpu, call, table) / time
              for call, time in measured.items() if call in calls}
    print('\n'.join(spread_lines(ratios)))
    return 0


if __name__ == '__main__':
    sys.exit(main())
