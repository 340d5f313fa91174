# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Times `dcnv4` on a GPU beside its peers, in one process on the same inputs.

    python benchmarks/gpu.py                  # ten shapes, all types and distributions
    python benchmarks/gpu.py --quick          # four shapes, float16
    python benchmarks/gpu.py --budget 500     # stops in time, what matters most comes first
    python benchmarks/gpu.py --resume FILE.json

Device time: the median of replays of a CUDA graph of some calls, divided by their number; the
candidates take turns. Inputs are cold (several sets, three times the L2 cache together) or hot (the
same ones every time, in the JSON alone). Host time: a loop of calls with one synchronisation at its
end. Backward is forward and backward together less forward, for everyone. `ours` are the direct
kernels, `ours fast` those on tensor cores. A floor is the bytes that have to be moved
by the bandwidth of a copy, or the time of an empty launch, both measured in the same run. Whoever
computes the same function is first compared with the reference in float64; the share of wrong
pixels stands beside its time.

Writes JSON, the tables and a plot (with matplotlib) to benchmarks/results/, after each problem:
what ends early leaves what it has measured.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import re
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple, Optional

import torch
from gpu_peers import PEERS, Call, Problem, absent, make_problem
from gpu_report import Report
from gpu_timing import (
    REFUSALS,
    backward_alone,
    copy_bandwidth,
    device_state,
    input_sets,
    launch_time,
    measure,
    refusal,
)
from torch import Tensor

from mmdcnv4.ops import _extension, dcnv4_reference

ROOT = Path(__file__).resolve().parents[1]
DEVICE = 'cuda'
SHAPES = ('64x56x56x128', '64x28x28x256', '64x14x14x512', '64x7x7x1024', '64x14x14x768',
          '1x200x320x128', '1x100x160x256', '1x50x80x512', '1x25x40x1024', '1x64x64x768')
QUICK_SHAPES = ('64x56x56x128', '64x14x14x512', '64x7x7x1024', '1x200x320x128')
DTYPES = {'float16': torch.float16, 'bfloat16': torch.bfloat16, 'float32': torch.float32}
# largest error, as a part of the largest exact number, of a pixel that is not wrong
GATE = {'float32': 1e-3, 'float16': 2e-2, 'bfloat16': 6e-2}


def parse_shape(text: str) -> tuple[int, ...]:
    """'64x56x56x128' -> (64, 56, 56, 128)."""
    if re.fullmatch(r'\d+(x\d+){3}', text) is None:
        raise argparse.ArgumentTypeError(f'a shape is NxHxWxC, got {text!r}')
    return tuple(int(number) for number in text.split('x'))


def exact_output(problem: Problem) -> Tensor:
    """The reference in float64, an image at a time."""
    images = [dcnv4_reference(value[None].double(), packed[None].double(), kernel_size=3,
                              padding=1, groups=problem.groups, offset_scale=problem.offset_scale)
              for value, packed in zip(problem.value, problem.offset_mask)]
    return torch.cat(images)


def wrong_pixels(call: Call, exact: Tensor, gate: float) -> float:
    """Share of output pixels that are wrong in some channel."""
    call.prepare()
    with torch.no_grad():
        error = (call.to_nhwc(call.run()).double() - exact).abs().amax(-1)
    return (~(error <= gate * exact.abs().max())).double().mean().item()


class Case(NamedTuple):
    """One problem by name; a row of the result is a case and a direction."""

    shape: str
    group_channels: int
    dtype: str
    offsets: str


def measure_case(case: Case, peers: list[str],
                 known: dict[tuple[str, str], dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the result for one problem: one for forward and one for backward.

    Args:
        case: the problem.
        peers: names of the candidates.
        known: (peer, direction) -> result, of peers that depend on the shape and the type alone;
            measured where it has none, and entered.
    """
    def problem(seed: int) -> Problem:
        return make_problem(parse_shape(case.shape), case.group_channels, DTYPES[case.dtype],
                            case.offsets, device=DEVICE, seed=seed)

    first = problem(0)
    count = input_sets(first.bytes_moved, torch.cuda.get_device_properties(0).L2_cache_size)
    problems = [first, *map(problem, range(1, count))]
    exact = exact_output(first)
    sets: dict[str, list[Call]] = {}
    refused: dict[str, dict[str, Any]] = {}
    wrong: dict[str, float] = {}
    for name in peers:
        if (name, 'forward') in known:
            continue
        try:
            calls = [PEERS[name].make(problem) for problem in problems]
            if PEERS[name].is_same:
                wrong[name] = wrong_pixels(calls[0], exact, GATE[case.dtype])
            sets[name] = calls
        except REFUSALS as error:
            refused[name] = refusal(error)
            torch.cuda.synchronize()  # raises where the device is lost
    del exact
    forward = measure(sets, with_backward=False)
    both = measure(sets, with_backward=True)
    results = dict(forward={**refused, **forward}, backward={
        **refused, **{name: backward_alone(both[name], forward[name]) for name in both}})
    for direction, of_peers in results.items():
        of_peers.update({name: result for (name, of), result in known.items() if of == direction})
        known.update({(name, direction): result for name, result in of_peers.items()
                      if not PEERS[name].is_same})
    row = dict(case._asdict(), input_sets=count, wrong_pixels=wrong)
    return [dict(row, direction='forward', bytes=first.bytes_moved, peers=results['forward']),
            dict(row, direction='backward', bytes=first.bytes_moved_backward,
                 peers=results['backward'])]


def parse_arguments(argv: Optional[list[str]] = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shapes', nargs='+', type=parse_shape, metavar='NxHxWxC')
    parser.add_argument('--group-channels', nargs='+', type=int, default=[32, 16])
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES)
    parser.add_argument('--offsets', nargs='+', choices=['D0', 'D1', 'D2', 'D3', 'D4'])
    parser.add_argument('--peers', nargs='+', choices=PEERS, default=list(PEERS))
    parser.add_argument('--quick', action='store_true', help='four shapes, float16, D1 D0 D3')
    parser.add_argument('--budget', type=float, metavar='SECONDS',
                        help='begin no problem after this time; --resume takes the rest')
    parser.add_argument('--resume', type=Path, metavar='JSON',
                        help='go on with the result of an earlier run')
    parser.add_argument('--output', type=Path, default=ROOT / 'benchmarks' / 'results')
    args = parser.parse_args(argv)
    args.shapes = args.shapes or list(map(parse_shape, QUICK_SHAPES if args.quick else SHAPES))
    args.dtypes = args.dtypes or (['float16'] if args.quick else list(DTYPES))
    args.offsets = args.offsets or (['D1', 'D0', 'D3'] if args.quick else
                                    ['D1', 'D0', 'D2', 'D3'])
    return args


def why_not() -> str:
    """Why nothing can be measured here, or an empty string."""
    if not torch.cuda.is_available():
        return f'torch {torch.__version__} sees no GPU'
    if 'cuda' not in _extension.build_info:
        return 'the CUDA kernels are not compiled; dev/gpu/build.sh builds them'
    return ''


def make_report(args: argparse.Namespace) -> Report:
    """A report without rows, or that of the run to be resumed; names what is absent."""
    missing = {name: absent(name) for name in args.peers}
    peers = ['ours'] + [name for name in args.peers if name != 'ours' and not missing[name]]
    device = torch.cuda.get_device_name()
    head = dict(device=device, torch=torch.__version__, cuda=torch.version.cuda,
                python=platform.python_version(), peers=peers,
                absent={name: why for name, why in missing.items() if why},
                copy_bytes_per_second=copy_bandwidth(DEVICE), launch_seconds=launch_time(DEVICE),
                state_before=device_state())
    if args.resume is not None:
        return Report.resume(args.resume, head)
    name = re.sub('[^a-z0-9]+', '-', device.lower())
    return Report(head, args.output / f'{name}-{time.strftime("%Y%m%d-%H%M%S")}')


def main(argv: Optional[list[str]] = None) -> int:
    """Measures, prints and writes everything; 1 where one of our kernels failed or was wrong."""
    args = parse_arguments(argv)
    reason = why_not()
    if reason:
        print(f'benchmarks/gpu.py: {reason}', file=sys.stderr)
        return 1
    started = time.monotonic()
    torch.backends.cudnn.benchmark = True  # the peers at their best
    report = make_report(args)
    print('\n'.join(report.lines()), flush=True)
    # the first shapes, types and distributions are complete before the next ones begin
    names = ['x'.join(map(str, shape)) for shape in args.shapes]
    cases = [Case(shape, depth, dtype, offsets) for offsets, depth, dtype, shape in
             itertools.product(args.offsets, args.group_channels, args.dtypes, names)]
    known: dict[tuple[str, str], dict[tuple[str, str], dict[str, Any]]] = {}
    left = [case for case in cases if not report.has(case._asdict())]
    while left and (args.budget is None or time.monotonic() - started < args.budget):
        case = left.pop(0)
        rows = measure_case(case, report.head['peers'],
                            known.setdefault((case.shape, case.dtype), {}))
        report.add(rows)
        print('\n'.join(map(report.line, rows)), flush=True)
        torch.cuda.empty_cache()
    report.head['state_after'] = device_state()
    print('\n'.join(report.finish(len(left))))
    return 0 if report.is_right() else 1


if __name__ == '__main__':
    sys.exit(main())
