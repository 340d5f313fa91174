# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Checks the kernels of multi-scale deformable attention against its PyTorch form in float64.

    python -m mmdcnv4.ops.attention_check [cuda]     a line per type and case; exit code 1 if wrong

Inputs come from arithmetic, as those of :mod:`mmdcnv4.ops.kernel_check`: points outside the maps,
NaN locations, levels of one pixel, channels that fill no vector.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .kernel_check import ALLOWED, DTYPES, MIXED, error_of, noise
from .multi_scale import (
    multi_scale_deformable_attention,
    multi_scale_deformable_attention_reference,
)

NAMES = ('output', 'grad_value', 'grad_locations', 'grad_weights')


class Case(NamedTuple):
    """One call: sizes, B, Q, heads, D, points."""

    name: str
    sizes: list[tuple[int, int]]
    numbers: tuple[int, int, int, int, int]


CASES = (Case('three levels', [(9, 7), (4, 5), (1, 1)], (2, 70, 3, 32, 4)),
         Case('one pixel', [(1, 1), (1, 1)], (2, 9, 2, 16, 2)),
         Case('odd channels', [(5, 8), (3, 1)], (3, 11, 2, 33, 3)),
         Case('wide', [(6, 4)], (1, 50, 1, 288, 19)))


def make_call(case: Case, dtypes: tuple[torch.dtype, torch.dtype]) -> list[Tensor]:
    """value, locations, weights, grad_output; a third of the samples is at a border or outside."""
    batch, queries, heads, channels, points = case.numbers
    pixels = sum(height * width for height, width in case.sizes)
    layout = (batch, queries, heads, len(case.sizes), points)
    shapes = ((batch, pixels, heads, channels), (*layout, 2), layout,
              (batch, queries, heads * channels))
    tensors = [noise(torch.Size(shape).numel(), seed).view(shape)
               for seed, shape in enumerate(shapes)]
    tensors[1].mul_(0.75).add_(0.5)
    tensors[1][:, ::5, 0, 0, 0, 0] = torch.nan
    tensors[1][:, ::7, -1, -1, -1, 1] = torch.inf
    return [tensor.to(dtypes[int(i in (1, 2))]) for i, tensor in enumerate(tensors)]


def _gradients(tensors: Sequence[Tensor], case: Case, native: bool) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:3]]
    if native:
        out = multi_scale_deformable_attention(leaves[0], case.sizes, *leaves[1:],
                                               backend='native')
    else:
        out = multi_scale_deformable_attention_reference(leaves[0], case.sizes, *leaves[1:])
    return [out.detach(), *torch.autograd.grad(out, leaves, tensors[3])]


def _is_right(name: str, found: Tensor, exact: Tensor, smooth: Tensor) -> bool:
    if name == 'grad_locations':  # it jumps where a sample lies on the centre of a pixel
        found, exact = found.cpu() * smooth, exact * smooth
    return error_of(found, exact) <= ALLOWED[found.dtype]


def check(device: str) -> Iterator[tuple[str, list[str]]]:
    """For each type and case: its name, and what is wrong."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    for dtype, types in {**DTYPES, **MIXED}.items():
        for case in CASES:
            tensors = make_call(case, types)
            exact = _gradients([tensor.double() for tensor in tensors], case, native=False)
            scale = torch.tensor([[w, h] for h, w in case.sizes]).double()[:, None]
            place = tensors[1].double() * scale - 0.5
            smooth = ((place - place.round()).abs() > 1e-3)
            placed = [tensor.to(device) for tensor in tensors]
            found = _gradients(placed, case, native=True)
            wrong = [name for name, one, right in zip(NAMES, found, exact)
                     if not _is_right(name, one, right, smooth.all(-1, keepdim=True))]
            torch.use_deterministic_algorithms(True)
            try:
                runs = [_gradients(placed, case, native=True) for _ in range(2)]
            finally:
                torch.use_deterministic_algorithms(deterministic)
            wrong += [f'{name} in deterministic mode' for name, one, again, right in zip(
                NAMES, *runs, exact) if not torch.equal(one, again)
                or not _is_right(name, one, right, smooth.all(-1, keepdim=True))]
            yield f'attention {dtype} {case.name}', wrong


def main(argv: Sequence[str]) -> int:
    """Prints a line per type and case; 1 if one of them is wrong."""
    failed = 0
    for name, wrong in check(argv[0] if argv else 'cuda'):
        print(f'{name:36} {"WRONG: " + ", ".join(wrong) if wrong else "ok"}', flush=True)
        failed += bool(wrong)
    print(f'attention: {failed} of {len(CASES) * len({**DTYPES, **MIXED})} calls are wrong')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
