# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Times `dcnv4` beside its grid_sample form and a depthwise 7x7 convolution.

    python benchmarks/cpu.py
    python benchmarks/cpu.py --shapes 1x56x56x64/16 --threads 1 2 --json times.json

A shape is NxHxWxC/D: images, height, width, channels, channels per group; the kernel is 3x3 with
stride 1 and padding 1, in float32. The results are checked against the reference first. Then all
candidates run in turn in this one process, some calls each, again and again, and the minimum of
each is printed: on a machine with other work it is the figure closest to the truth. The
convolution is timed with NCHW and with channels-last input, and the faster one counts.

GB/s counts every tensor that has to be read or written once; caches may deliver more than memory.

Peak memory is the growth of the largest resident set (VmHWM of Linux; not ru_maxrss, which a
process inherits from its parent) during one forward and backward, measured in a process per form
after the inputs exist: output, gradients and everything between them.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdcnv4.ops import dcnv4, dcnv4_reference, offset_mask_channels
from mmdcnv4.testing import (
    Inputs,
    assert_matches_reference,
    cpu_threads,
    dcnv4_grid_sample,
    make_inputs,
)

SHAPES = ('1x56x56x64/16', '1x14x14x256/16', '1x56x56x128/32', '1x100x160x128/16')
MEMORY_SHAPE = '1x100x160x128/16'
GEOMETRY = dict(kernel_size=3, padding=1)
FORMS: dict[str, Callable[..., Tensor]] = {
    'dcnv4': functools.partial(dcnv4, backend='native'),
    'grid_sample': dcnv4_grid_sample,
    'reference': dcnv4_reference,
}
PASSES = ('forward', 'backward')


class Shape(NamedTuple):
    """Sizes of one problem."""

    batch: int
    height: int
    width: int
    channels: int
    group_channels: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads NxHxWxC/D."""
        match = re.fullmatch(r'(\d+)x(\d+)x(\d+)x(\d+)/(\d+)', text)
        if match is None:
            raise argparse.ArgumentTypeError(f'a shape is NxHxWxC/D, got {text!r}')
        shape = cls(*map(int, match.groups()))
        if min(shape) < 1 or shape.channels % shape.group_channels:
            raise argparse.ArgumentTypeError(f'D must divide C, and all be >= 1, got {text!r}')
        return shape

    @property
    def geometry(self) -> dict:
        """Arguments of `dcnv4`."""
        return dict(groups=self.channels // self.group_channels, **GEOMETRY)

    def inputs(self, device: torch.device) -> Inputs:
        """Random leaves: offsets of up to three pixels, as in trained networks."""
        inputs = make_inputs(self.batch, self.height, self.width, self.group_channels,
                             dtype=torch.float32, **self.geometry)
        return Inputs(*(tensor.to(device).requires_grad_() for tensor in inputs))

    def __str__(self) -> str:
        return '{}x{}x{}x{}/{}'.format(*self)


def candidates(shape: Shape, device: torch.device) -> dict[str, dict[str, Callable[[], object]]]:
    """name -> pass -> a function of no arguments that runs it once."""
    inputs = shape.inputs(device)
    runs = {name: passes(functools.partial(FORMS[name], *inputs, **shape.geometry), inputs)
            for name in ('dcnv4', 'grid_sample')}
    weight = torch.randn(shape.channels, 1, 7, 7, device=device, requires_grad=True)
    image = inputs.value.detach().permute(0, 3, 1, 2)
    layouts = {'conv7x7 nhwc': image, 'conv7x7 nchw': image.contiguous()}
    for name, layout in layouts.items():
        layout = layout.detach().requires_grad_()
        runs[name] = passes(functools.partial(F.conv2d, layout, weight, padding=3,
                                              groups=shape.channels), (layout, weight))
    return runs


def passes(function: Callable[[], Tensor],
           leaves: tuple[Tensor, ...]) -> dict[str, Callable[[], object]]:
    """The forward pass as in inference, and the backward pass alone."""
    output = function()
    grad_output = torch.randn_like(output)
    return dict(forward=torch.no_grad()(function),
                backward=functools.partial(torch.autograd.grad, output, leaves, grad_output,
                                           retain_graph=True))


def measure(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type != 'cpu':
        torch.get_device_module(device).synchronize()
    start = time.perf_counter()
    run()
    if device.type != 'cpu':
        torch.get_device_module(device).synchronize()
    return 1e3 * (time.perf_counter() - start)


def fastest(run: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of the fastest of the calls within 20 ms: the first of them warm the caches."""
    times = [measure(run, device), measure(run, device)]
    while sum(times) < 20:
        times.append(measure(run, device))
    return min(times)


def time_shape(shape: Shape, threads: int, seconds: float, device: torch.device) -> list[dict]:
    """Minimum times of all candidates in turn, one record per pass."""
    records = []
    with cpu_threads(threads):
        runs = candidates(shape, device)
        for name in PASSES:
            best = {key: float('inf') for key in runs}
            rounds, end = 0, time.perf_counter() + seconds
            while rounds < 5 or time.perf_counter() < end:
                for key in best:
                    best[key] = min(best[key], fastest(runs[key][name], device))
                rounds += 1
            conv = min(best['conv7x7 nhwc'], best['conv7x7 nchw'])
            records.append({
                'shape': str(shape), 'pass': name, 'threads': threads, 'rounds': rounds,
                'dcnv4_ms': best['dcnv4'], 'grid_sample_ms': best['grid_sample'],
                'conv7x7_ms': conv, 'times_grid_sample': best['grid_sample'] / best['dcnv4'],
                'times_conv7x7': conv / best['dcnv4'],
                'gb_per_s': bytes_moved(shape, name) / best['dcnv4'] / 1e6})
    return records


def bytes_moved(shape: Shape, name: str) -> int:
    """Bytes of the tensors of one pass, each counted once."""
    inputs = make_inputs(1, shape.height, shape.width, shape.group_channels, **shape.geometry)
    value, offset_mask = (4 * shape.batch * tensor.numel() for tensor in inputs)
    return 2 * value + offset_mask if name == 'forward' else 3 * value + 2 * offset_mask


def peak_resident() -> int:
    """Bytes of the largest resident set that this process has had."""
    status = Path('/proc/self/status').read_text()
    return 1024 * int(re.search(r'VmHWM:\s*(\d+) kB', status)[1])


def peak_growth(form: str, shape: Shape, device: torch.device) -> int:
    """Bytes by which one forward and backward raise the peak of this process."""
    FORMS[form](*Shape(1, 8, 8, 16, 16).inputs(device), groups=1, **GEOMETRY).sum().backward()
    # drawn in float32: the float64 numbers of `make_inputs` would be the peak of the process
    points = GEOMETRY['kernel_size']**2
    packed = offset_mask_channels(shape.channels // shape.group_channels, points)
    inputs = Inputs(*(torch.randn(*shape[:3], size, device=device, requires_grad=True)
                      for size in (shape.channels, packed)))
    grad_output = torch.randn_like(inputs.value)
    before = peak_resident()
    FORMS[form](*inputs, **shape.geometry).backward(grad_output)
    return peak_resident() - before


def peaks(shape: Shape) -> dict[str, float]:
    """MiB of peak growth per form, each in a process of its own."""
    result = {}
    for form in FORMS:
        output = subprocess.run([sys.executable, __file__, '--peak-of', form, '--shapes',
                                 str(shape)], capture_output=True, text=True, check=True).stdout
        result[form] = int(output) / 2**20
    return result


def print_times(records: list[dict]) -> None:
    """One row per shape, pass and number of threads."""
    print(f'{"shape":<18}{"pass":<10}{"threads":>7}{"dcnv4":>10}{"grid_sample":>13}{"conv7x7":>10}'
          f'{"vs grid":>10}{"vs conv":>10}{"GB/s":>8}')
    for r in records:
        print(f'{r["shape"]:<18}{r["pass"]:<10}{r["threads"]:>7}{r["dcnv4_ms"]:>8.3f}ms'
              f'{r["grid_sample_ms"]:>11.3f}ms{r["conv7x7_ms"]:>8.3f}ms'
              f'{r["times_grid_sample"]:>9.1f}x{r["times_conv7x7"]:>9.2f}x{r["gb_per_s"]:>8.2f}')


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', nargs='+', type=Shape.parse, metavar='NxHxWxC/D',
                        default=[Shape.parse(text) for text in SHAPES])
    parser.add_argument('--threads', nargs='+', type=int, default=[1, 2])
    parser.add_argument('--seconds', type=float, default=3.0,
                        help='time for each shape, pass and number of threads (default: 3)')
    parser.add_argument('--device', type=torch.device, default=torch.device('cpu'))
    parser.add_argument('--json', metavar='FILE', help='write the figures to this file as well')
    parser.add_argument('--no-memory', action='store_true', help='do not measure peak memory')
    parser.add_argument('--peak-of', choices=FORMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Checks, times, prints."""
    args = parse_arguments()
    if args.peak_of:
        print(peak_growth(args.peak_of, args.shapes[0], args.device))
        return
    for shape in args.shapes:
        inputs = shape.inputs(args.device)
        assert_matches_reference(FORMS['dcnv4'], inputs, **shape.geometry)
    print(f'torch {torch.__version__}, {args.device}: results agree with the reference; minimum '
          f'of at least 5 rounds and {args.seconds:g} s')
    records = [record for shape in args.shapes for threads in args.threads
               for record in time_shape(shape, threads, args.seconds, args.device)]
    print_times(records)
    with_memory = not args.no_memory and args.device.type == 'cpu' and sys.platform == 'linux'
    memory = peaks(Shape.parse(MEMORY_SHAPE)) if with_memory else {}
    if memory:
        print(f'peak memory of forward and backward at {MEMORY_SHAPE}, beside the inputs: '
              + ', '.join(f'{form} {mib:.0f} MiB' for form, mib in memory.items()))
    if args.json:
        with open(args.json, 'w') as file:
            json.dump(dict(torch=torch.__version__, device=str(args.device), times=records,
                           peak_mib=memory), file, indent=2)


if __name__ == '__main__':
    main()
