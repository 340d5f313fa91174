# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Times `dcnv4` on a GPU beside its peers, in one process on the same inputs.

    python tools/benchmark_gpu.py                  # ten shapes, all types and distributions
    python tools/benchmark_gpu.py --quick          # four shapes, float16

Device time: the median of replays of a CUDA graph of some calls, divided by their number; the
candidates take turns. Inputs are cold (several sets, three times the L2 cache together). Host time:
a loop of calls with one synchronisation at its end. Backward is forward and backward together less
forward, for everyone. `ours` are the direct kernels, `ours fast` those on tensor cores (half
types; elsewhere they are the same kernels again). Floors are the bytes that have to be moved, by
the bandwidth of a copy measured in the same run. Whoever computes the same function is first
compared with the reference in float64; the share of wrong pixels stands beside its time.

Writes JSON, the table and a plot (with matplotlib) to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import torch
from gpu_peers import PEERS, Call, Problem, absent, make_problem
from torch import Tensor

from mmdcnv4.ops import dcnv4_reference

ROOT = Path(__file__).resolve().parents[1]
SHAPES = ('64x56x56x128', '64x28x28x256', '64x14x14x512', '64x7x7x1024', '64x14x14x768',
          '1x200x320x128', '1x100x160x256', '1x50x80x512', '1x25x40x1024', '1x64x64x768')
QUICK_SHAPES = ('64x56x56x128', '64x14x14x512', '64x7x7x1024', '1x200x320x128')
DTYPES = {'float32': torch.float32, 'float16': torch.float16, 'bfloat16': torch.bfloat16}
# largest error, as a part of the largest exact number, of a pixel that is not wrong
GATE = {'float32': 1e-3, 'float16': 2e-2, 'bfloat16': 6e-2}
CALLS, ROUNDS, REPLAYS = 10, 5, 10


def parse_shape(text: str) -> tuple[int, ...]:
    """'64x56x56x128' -> (64, 56, 56, 128)."""
    if re.fullmatch(r'\d+(x\d+){3}', text) is None:
        raise argparse.ArgumentTypeError(f'a shape is NxHxWxC, got {text!r}')
    return tuple(int(number) for number in text.split('x'))


def elapsed(run: Callable[[], Any], repeat: int) -> list[float]:
    """Milliseconds of each of `repeat` runs, by events on the current stream."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeat + 1)]
    events[0].record()
    for event in events[1:]:
        run()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in zip(events, events[1:])]


def copy_bandwidth() -> float:
    """Bytes per second of a large copy, read and written bytes counted."""
    source = torch.randn(2**28, device='cuda')
    target = torch.empty_like(source)
    target.copy_(source)
    milliseconds = statistics.median(elapsed(lambda: target.copy_(source), 10))
    return 2 * source.numel() * source.element_size() / milliseconds * 1e3


def once(call: Call, grad: Optional[Tensor]) -> None:
    """Forward, or forward and backward."""
    if grad is None:
        with torch.no_grad():
            call.run()
    else:
        torch.autograd.grad(call.run(), call.leaves, grad)


def capture(calls: list[Call], grad: Optional[Tensor]) -> torch.cuda.CUDAGraph:
    """A graph of CALLS calls, the sets of inputs in turn."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            once(call, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(CALLS):
            once(calls[i % len(calls)], grad)
    return graph


def host_time(call: Call, grad: Optional[Tensor], repeat: int = 200) -> float:
    """Milliseconds per call of a loop with one synchronisation at its end."""
    once(call, grad)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeat):
        once(call, grad)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeat * 1e3


def exact_output(problem: Problem) -> Tensor:
    """The reference in float64, an image at a time."""
    images = [dcnv4_reference(value[None].double(), packed[None].double(), kernel_size=3,
                              padding=1, groups=problem.groups, offset_scale=problem.offset_scale)
              for value, packed in zip(problem.value, problem.offset_mask)]
    return torch.cat(images)


def wrong_pixels(call: Call, exact: Tensor, gate: float) -> float:
    """Share of output pixels that are wrong in some channel."""
    with torch.no_grad():
        error = (call.to_nhwc(call.run()).double() - exact).abs().amax(-1)
    return (~(error <= gate * exact.abs().max())).double().mean().item()


def measure_calls(sets: dict[str, list[Call]], with_backward: bool) -> dict[str, dict[str, float]]:
    """Device and host milliseconds of each candidate, taken in turn; or the error it raised."""
    graphs, results = {}, {}
    for name, calls in sets.items():
        grad = torch.randn_like(calls[0].run()) if with_backward else None
        try:
            graphs[name] = capture(calls, grad)
            results[name] = dict(host_ms=host_time(calls[0], grad, 50 if with_backward else 200))
        except (RuntimeError, AssertionError) as error:
            results[name] = dict(error=str(error).splitlines()[0][:200])
            torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(ROUNDS):
        for name, graph in graphs.items():
            graph.replay()
            times[name] += [ms / CALLS for ms in elapsed(graph.replay, REPLAYS)]
    for name, list_of_ms in times.items():
        middle = statistics.median(list_of_ms)
        quartiles = statistics.quantiles(list_of_ms, n=4)
        results[name].update(device_ms=middle, spread=(quartiles[2] - quartiles[0]) / middle)
    return results


def measure_problem(shape: tuple[int, ...], group_channels: int, dtype: str, offsets: str,
                    peers: list[str]) -> list[dict[str, Any]]:
    """Rows of the result for one problem: one for forward and one for backward."""
    first = make_problem(shape, group_channels, DTYPES[dtype], offsets)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    count = min(8, max(1, -(-3 * cache // first.bytes_moved)))
    problems = [first] + [make_problem(shape, group_channels, DTYPES[dtype], offsets, seed=seed)
                          for seed in range(1, count)]
    exact = exact_output(first)
    sets, wrong = {}, {}
    for name in peers:
        sets[name] = [PEERS[name].make(problem) for problem in problems]
        if PEERS[name].is_same:
            wrong[name] = wrong_pixels(sets[name][0], exact, GATE[dtype])
    del exact
    forward = measure_calls(sets, with_backward=False)
    both = measure_calls(sets, with_backward=True)
    for name, result in both.items():
        for key in ('device_ms', 'host_ms'):
            if key in result and key in forward[name]:
                result[key] -= forward[name][key]
    case = dict(shape='x'.join(map(str, shape)), group_channels=group_channels, dtype=dtype,
                offsets=offsets, input_sets=count, wrong_pixels=wrong)
    return [dict(case, direction='forward', bytes=first.bytes_moved, peers=forward),
            dict(case, direction='backward', bytes=first.bytes_moved_backward, peers=both)]


def table_line(row: dict[str, Any], bandwidth: float, names: list[str]) -> str:
    """One row as text: microseconds of device time, and ratios to ours."""
    floor = row['bytes'] / bandwidth * 1e6
    cells = [f'{row["shape"]:>14} {row["group_channels"]:3} {row["dtype"]:>8} {row["offsets"]} '
             f'{row["direction"]:8} {floor:8.1f}']
    own = row['peers']['ours'].get('device_ms')
    for name in names:
        result = row['peers'].get(name, {})
        if 'device_ms' not in result:
            cells.append(f'{"-":>22}')
            continue
        text = f'{1e3 * result["device_ms"]:.1f}'
        if name == 'ours':
            text += f' ({100 * floor / (1e3 * result["device_ms"]):.0f}% of floor)'
        elif own:
            text += f' ({result["device_ms"] / own:.2f}x)'
        share = row['wrong_pixels'].get(name, 0)
        cells.append(f'{text + (f" WRONG {100 * share:.1f}%" if share else ""):>22}')
    return ' | '.join(cells)


def draw(rows: list[dict[str, Any]], names: list[str], path: Path) -> bool:
    """Device time of ours and of peers over the problems; False without matplotlib."""
    try:
        import matplotlib
        matplotlib.use('Agg')
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(2, 1, figsize=(14, 10), constrained_layout=True)
    for axis, direction in zip(axes, ('forward', 'backward')):
        chosen = [row for row in rows if row['direction'] == direction]
        for name in names:
            points = [(i, 1e3 * row['peers'][name]['device_ms']) for i, row in enumerate(chosen)
                      if 'device_ms' in row['peers'].get(name, {})]
            if points:
                axis.plot(*zip(*points), marker='o', label=name)
        labels = [f'{row["shape"]}/{row["group_channels"]} {row["dtype"]} {row["offsets"]}'
                  for row in chosen]
        axis.set_xticks(range(len(chosen)), labels, rotation=90, fontsize=6)
        axis.set(yscale='log', ylabel='µs of device time', title=direction)
        axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--shapes', nargs='+', type=parse_shape, metavar='NxHxWxC')
    parser.add_argument('--group-channels', nargs='+', type=int, default=[32, 16])
    parser.add_argument('--dtypes', nargs='+', choices=DTYPES)
    parser.add_argument('--offsets', nargs='+', choices=['D0', 'D1', 'D2', 'D3', 'D4'])
    parser.add_argument('--peers', nargs='+', choices=PEERS, default=list(PEERS))
    parser.add_argument('--quick', action='store_true', help='four shapes, float16, D0 D1 D3')
    parser.add_argument('--output', type=Path, default=ROOT / 'benchmarks' / 'results')
    args = parser.parse_args()
    args.shapes = args.shapes or list(map(parse_shape, QUICK_SHAPES if args.quick else SHAPES))
    args.dtypes = args.dtypes or (['float16'] if args.quick else list(DTYPES))
    args.offsets = args.offsets or (['D0', 'D1', 'D3'] if args.quick else
                                    ['D0', 'D1', 'D2', 'D3'])
    return args


def main() -> int:
    """Measures, prints and writes everything."""
    args = parse_arguments()
    if not torch.cuda.is_available():
        print('benchmark_gpu: torch sees no GPU', file=sys.stderr)
        return 1
    missing = {name: absent(name) for name in args.peers}
    peers = ['ours'] + [name for name in args.peers if name != 'ours' and not missing[name]]
    bandwidth = copy_bandwidth()
    device = torch.cuda.get_device_name()
    head = (f'{device}, torch {torch.__version__}, Python {platform.python_version()}, copy '
            f'{bandwidth / 1e12:.2f} TB/s; µs of device time, peers as multiples of ours')
    names = ' | '.join(f'{name:>22}' for name in peers)
    lines = [head, *(f'absent: {name}: {why}' for name, why in missing.items() if why),
             f'{"shape":>14} {"D":>3} {"dtype":>8} {"":2} {"":8} {"floor":>8} | {names}']
    print('\n'.join(lines), flush=True)
    rows = []
    for shape in args.shapes:
        for group_channels in args.group_channels:
            for dtype in args.dtypes:
                for offsets in args.offsets:
                    for row in measure_problem(shape, group_channels, dtype, offsets, peers):
                        rows.append(row)
                        lines.append(table_line(row, bandwidth, peers))
                        print(lines[-1], flush=True)
                    gc.collect()
                    torch.cuda.empty_cache()
    args.output.mkdir(parents=True, exist_ok=True)
    device_name = re.sub('[^a-z0-9]+', '-', device.lower())
    stem = args.output / f'{device_name}-{time.strftime("%Y%m%d-%H%M")}'
    report = dict(device=device, torch=torch.__version__, copy_bytes_per_second=bandwidth,
                  absent={name: why for name, why in missing.items() if why}, rows=rows)
    stem.with_suffix('.json').write_text(json.dumps(report, indent=1) + '\n')
    stem.with_suffix('.txt').write_text('\n'.join(lines) + '\n')
    drawn = draw(rows, peers, stem.with_suffix('.png'))
    print(f'written: {stem}.json, .txt' + (', .png' if drawn else '; no plot without matplotlib'))
    return 0


if __name__ == '__main__':
    sys.exit(main())
