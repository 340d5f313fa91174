# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What one eager call costs the host: a map so small that its pixels take next to no time.

A GPU works through its queue while the host fills it, so a network whose calls take the host longer
than the device is bound by the host, whatever the kernels do. The CPU kernel runs here inside the
measured time.

All rows of a map are timed in turns within one process, and the least time of each counts: another
program that takes the core for a while makes a round slower, never faster, and rounds are so short
that some are left alone. Times of different processes or machines are not comparable; the ratios
are meant to be. Unless a row says otherwise only the forward pass is timed, with making and freeing
the graph.

Usage: python benchmarks/host_time.py [--rounds 500] [--calls 20]
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mmdcnv4.ops import DCNv4, dcnv4, offset_mask_channels

CHANNELS, GROUPS = 32, 2
GEOMETRY: dict[str, Any] = dict(kernel_size=3, groups=GROUPS, padding=1)
SCALARS = ([3, 3], GROUPS, [1, 1], [1, 1], [1, 1], 1.0, False, False)
UNIT = 'autograd.Function of two tensors'  # the row that the others are divided by
Call = Callable[[], object]


class Add(torch.autograd.Function):
    """The least that an operator with gradients can cost when it is written in Python."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        """Adds."""
        return a + b

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of a sum, twice."""
        return grad, grad


def with_backward(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...], grad: Tensor) -> Call:
    """A call forward and backward."""
    return lambda: torch.autograd.grad(forward(), leaves, grad)


def rows_for(side: int) -> dict[str, tuple[Call, Any]]:
    """What is timed on a map of 1 x side x side x 32, with the context it is timed in."""
    value = torch.randn(1, side, side, CHANNELS)
    packed = torch.randn(1, side, side, offset_mask_channels(GROUPS, 9))
    a, b = (torch.randn_like(value).requires_grad_() for _ in range(2))
    leaves = value.clone().requires_grad_(), packed.clone().requires_grad_()
    grad = torch.ones_like(value)
    layer = DCNv4(CHANNELS, group=GROUPS, mask_init=0.1)
    operator = torch.ops.mmdcnv4.dcnv4

    def linears() -> None:
        layer.value_proj(value)
        layer.offset_mask(value)
        layer.output_proj(value)

    def halves() -> Any:
        return torch.autocast('cpu', torch.bfloat16)

    def run(leaves: tuple[Tensor, Tensor]) -> Call:
        return lambda: dcnv4(*leaves, **GEOMETRY)

    plain = contextlib.nullcontext
    return {
        'addition': (lambda: value + value, plain),
        UNIT: (lambda: Add.apply(a, b), plain),
        'torch.ops, no gradients': (lambda: operator(value, packed, *SCALARS), plain),
        'torch.ops, gradients': (lambda: operator(*leaves, *SCALARS), plain),
        'dcnv4, no gradients': (run((value, packed)), plain),
        'dcnv4, gradients': (run(leaves), plain),
        'dcnv4, gradients, autocast': (run(leaves), halves),
        'three linears, gradients': (linears, plain),
        'layer DCNv4, gradients': (lambda: layer(value), plain),
        'three linears, inference_mode': (linears, torch.inference_mode),
        'layer DCNv4, inference_mode': (lambda: layer(value), torch.inference_mode),
        'autograd.Function, and backward': (with_backward(lambda: Add.apply(a, b), (a, b), grad),
                                            plain),
        'dcnv4, and backward': (with_backward(lambda: dcnv4(*leaves, **GEOMETRY), leaves, grad),
                                plain),
    }


def least_times(rows: dict[str, tuple[Call, Any]], rounds: int, calls: int) -> dict[str, float]:
    """Microseconds per call, the least of all rounds."""
    least = dict.fromkeys(rows, float('inf'))
    for _ in range(rounds):
        for name, (call, context) in rows.items():
            with context():
                call()
                start = time.perf_counter()
                for _ in range(calls):
                    call()
                least[name] = min(least[name], (time.perf_counter() - start) / calls * 1e6)
    return least


def main() -> None:
    """Prints one table per map."""
    parser = argparse.ArgumentParser(description=(__doc__ or '').split('\n')[0])
    parser.add_argument('--rounds', type=int, default=500)
    parser.add_argument('--calls', type=int, default=20, help='calls per row and round')
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for side in (1, 7):
        least = least_times(rows_for(side), arguments.rounds, arguments.calls)
        print(f'\n1x{side}x{side}x{CHANNELS}, float32, {GROUPS} groups, torch {torch.__version__}')
        print(f'{"us":>8} {"ratio":>7}  call')
        for name, time_us in least.items():
            print(f'{time_us:8.2f} {time_us / least[UNIT]:7.2f}  {name}')
        for mode in ('gradients', 'inference_mode'):
            ratio = least[f'layer DCNv4, {mode}'] / least[f'three linears, {mode}']
            print(f'layer / its three linears, {mode}: {ratio:.2f}')


if __name__ == '__main__':
    main()
