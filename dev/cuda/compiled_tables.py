# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The tables of csrc/cuda/compiled.md: what `check_ptxas.py` found, for people and for predict.py.

The second table is the one that benchmarks/executions.py reads; the third is what follows from it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import executions as model
from far_taps import DISTRIBUTIONS, WARP, far_rates, has_windows
from window_groups import Group

if TYPE_CHECKING:
    from check_ptxas import Kernel

Key = tuple[str, str, str]  # kernel, shape, dtype
BACKWARD = ('window_grad_offset', 'window_grad_value')
RARE = ('window_clear', 'window_grad_rest')  # few warps, whatever the call

INTRODUCTION = """# What the compiler makes of the kernels

Written by `dev/cuda/check_ptxas.py --write`, with nvcc {nvcc}, for {archs}; the kernels of
`dcnv4` are those with hash `{hash}`. One line per kind of kernel and dtype of `value`: the largest
number among its kernels. Instructions are those in the code.

"""
PARTS = """
## Instructions per part

What a warp executes of a 3x3 kernel where offsets have the dtype of `value`, with the widest loads
and without softmax, by parts of the kernel: `dev/cuda/machine_code.py` says how they are told from
each other, `benchmarks/executions.py` how often they run in a call. From this table
`benchmarks/predict.py` predicts times.

"""
EXECUTED = """
## Instructions for 256 outputs

For offsets D0 (zero), D1 (N(0, 0.5)), D2 (N(0, 2)), D3 (U(-2, 2), times an `offset_scale` of 2) and
D4 (U(-10, 10), times 2): tensor-core kernels take the first three, direct ones the others. For
tensor-core kernels: a block of 16x8 pixels, all of them in the image, with far taps as often as on
a map of 56x56; `window backward` is the gradients of offsets and of value together.
Direct kernels execute the same for every distribution. For comparison, by nvcc 13.0: the released
DCNv4 kernels in float16 with groups of 32 channels execute about 1670 forward, with 56 registers
and 40 bytes of stack, and about 21600 backward.

"""
ATTENTION = """
Attention, with 4 levels of 4 points in heads of 32 channels; backward as if every sample lay in
another cell than the one before. mmcv 2.1 in float32, by nvcc 13.0: about 12500 forward and 36600
backward, with 39 and 48 registers.

"""


def rows_of(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """Lines of a Markdown table."""
    head = list(head)
    lines = [head, ['---'] * len(head), *map(list, rows)]
    return ['| ' + ' | '.join(line) + ' |' for line in lines]


def compiled(kernels: list[Kernel], archs: list[str]) -> list[str]:
    """One line per kind of kernel and dtype, the largest number of each."""
    kinds: dict[Key, list[Kernel]] = {}
    for kernel in kernels:
        kinds.setdefault((kernel.direction, kernel.shape, kernel.dtype), []).append(kernel)

    def cells(group: list[Kernel], name: str) -> str:
        numbers = []
        for arch in archs:
            known = [getattr(kernel, name) for kernel in group if kernel.arch == arch]
            numbers.append(str(max((n for n in known if n is not None), default='-')))
        return ' / '.join(numbers)

    return rows_of(
        ['kernel', 'shape', 'dtype', 'kernels', f'registers, {" / ".join(archs)}', 'stack',
         'spills', 'instructions'],
        ([*key, str(len(group) // len(archs)), cells(group, 'registers'),
          str(max(k.stack for k in group)), str(max(k.spills for k in group)),
          cells(group, 'instructions')] for key, group in sorted(kinds.items())))


def parts(kernels: list[Kernel], archs: list[str]) -> list[str]:
    """Instructions per run of each part."""
    found = {(kernel.direction, shape, kernel.dtype, kernel.arch): (kernel.registers, counts)
             for kernel in kernels for shape, counts in kernel.parts.items()
             if not kernel.direction.startswith('attention')}
    order = sorted(found, key=lambda key: (*key[:3], archs.index(key[3])))
    return rows_of(model.COLUMNS, (
        [*key[:3], f'sm_{key[3]}', str(found[key][0]),
         ', '.join(f'{part} {count:g}' for part, count in found[key][1].items())]
        for key in order))


def block_launch(direction: str, group: Group, offsets: str) -> model.Launch:
    """A block of 16x8 pixels, all of them in the image, with as many warps as have work."""
    rows, pairs = 128 * group.of_slice, 4 * group.of_slice
    warps = 8 if direction == 'window_grad_value' else min(8, pairs)
    return model.Launch(direction, group, 1, warps * WARP, rows, 8, 16, 2 * pairs,
                        far_rates(56, 56, group, offsets))


def per_256(kernel: Kernel, shape: str, offsets: str) -> float:
    """Instructions for 256 outputs; of attention an output has 16 samples, 32 are looked at."""
    counts = kernel.parts[shape]
    if not kernel.is_window:
        samples = 16 / 32 if kernel.direction == 'attention_backward' else 1
        return counts['warps'] * 256 * samples / (WARP * kernel.vec)
    launch = block_launch(kernel.direction, Group(kernel.depth, kernel.size), offsets)
    count = model.instructions(model.Kernel(kernel.registers, counts), launch)
    return count * 256 / (launch.rows * kernel.depth)


def executed(kernels: list[Kernel], archs: list[str]) -> list[str]:
    """Instructions for 256 outputs by distribution of offsets."""
    table: dict[Key, dict[tuple[str, str], float]] = {}
    for kernel in kernels:
        for shape in kernel.parts:
            if kernel.direction in RARE or kernel.direction.startswith('attention'):
                continue
            for offsets in DISTRIBUTIONS:
                if kernel.is_window and not has_windows(offsets):
                    continue
                count = per_256(kernel, shape, offsets)
                names = [kernel.direction]
                if kernel.direction in BACKWARD:
                    names.append('window backward')
                for name in names:
                    cells = table.setdefault((name, shape, kernel.dtype), {})
                    place = offsets, kernel.arch
                    cells[place] = cells.get(place, 0) + count
    return rows_of(
        ['kernel', 'shape', 'dtype', *(f'{name}, {" / ".join(archs)}' for name in DISTRIBUTIONS)],
        ([*key, *(' / '.join(f'{cells[offsets, arch]:.0f}' for arch in archs)
                  if (offsets, archs[0]) in cells else '-' for offsets in DISTRIBUTIONS)]
         for key, cells in sorted(table.items())))


def attention(kernels: list[Kernel], archs: list[str]) -> list[str]:
    """Instructions for 256 outputs of the kernels of attention that most calls take."""
    table: dict[tuple[str, str], dict[str, float]] = {}
    for kernel in kernels:
        for shape in kernel.parts if kernel.direction.startswith('attention') else ():
            cells = table.setdefault((kernel.direction, kernel.dtype), {})
            cells[kernel.arch] = per_256(kernel, shape, 'D0')
    return rows_of(['kernel', 'dtype', f'instructions, {" / ".join(archs)}'],
                   ([*key, ' / '.join(f'{cells[arch]:.0f}' for arch in archs)]
                    for key, cells in sorted(table.items())))


def tables(kernels: list[Kernel], nvcc: str, kernel_hash: str) -> str:
    """The text of compiled.md."""
    archs = list(dict.fromkeys(kernel.arch for kernel in kernels))
    introduction = INTRODUCTION.format(nvcc=nvcc, hash=kernel_hash,
                                       archs=', '.join(f'sm_{arch}' for arch in archs))
    return (introduction + '\n'.join(compiled(kernels, archs)) + '\n' + PARTS
            + '\n'.join(parts(kernels, archs)) + '\n' + EXECUTED
            + '\n'.join(executed(kernels, archs)) + '\n' + ATTENTION
            + '\n'.join(attention(kernels, archs)) + '\n')
