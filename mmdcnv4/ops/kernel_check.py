# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Checks every family of CUDA kernels on this machine's GPU against the reference in float64.

    python -m mmdcnv4.info --check              a table, and the verdict kept (ops/proven.py)
    python -m mmdcnv4.ops.kernel_check FAMILY   the rows of these families (default: all) as JSON

Inputs come from arithmetic rather than from a generator, so that every machine checks the same
calls: ragged tiles; samples near their pixel, far from it and outside the image; NaN offsets and
pixels. An error is ||actual - exact|| / ||exact|| over the finite elements; NaN must stand in
exactly the same places.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor

from . import _extension, proven
from .contract import make_geometry, offset_mask_channels, output_size
from .functional import dcnv4
from .reference import dcnv4_reference

NAMES = ('output', 'grad_value', 'grad_offset_mask')
# Largest relative error, in norm. Rounding a number to p bits errs by at most 2^-p / sqrt(3) in the
# mean square (2.8e-4 for float16, 2.3e-3 for bfloat16). float16 on tensor cores rounds weights and
# result: sqrt(2) times that. bfloat16 keeps 16 bits of a weight, so that only the result counts;
# its numbers are spread over a binade, which leaves 1.7e-3, and one more rounding would be 2.4e-3.
ALLOWED = {torch.float64: 1e-13, torch.float32: 2e-6, torch.float16: 4e-4, torch.bfloat16: 2e-3}
# In float32 tensor cores multiply numbers of TF32, two for each factor. Of a product 2^-20 is left
# out at most, and each of up to 24 sums is cut off, by 2^-23 at most: together 2^-18. A part that
# is missing would be 1e-4.
ALLOWED_SPLIT = ALLOWED[torch.float32] + 2.0**-18
DTYPES = dict(f64=(torch.float64, torch.float64), f32=(torch.float32, torch.float32),
              f16=(torch.float16, torch.float16), bf16=(torch.bfloat16, torch.bfloat16))
MIXED = {'f16-f32': (torch.float16, torch.float32), 'bf16-f32': (torch.bfloat16, torch.float32)}
SAME: dict[str, Any] = dict(kernel_size=3, padding=1)
DIRECT: dict[str, dict[str, Any]] = {
    '3x3': SAME,
    '3x3-strided': dict(kernel_size=3, stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    '3x3-ring': dict(kernel_size=3, padding=(1, 2), offset_scale=0.5, remove_center=True),
    '5x5-softmax': dict(kernel_size=5, padding=(1, 2), softmax=True)}
WINDOW = {name: DIRECT[name] for name in ('3x3', '3x3-ring')}

Tensors = tuple[Tensor, ...]


class Case(NamedTuple):
    """One call."""

    name: str
    size: tuple[int, int, int, int, int]  # N, H, W, G, D
    dtypes: tuple[torch.dtype, torch.dtype]  # of value and of offset_mask
    geometry: dict[str, Any]
    fast: bool = False
    with_nan: bool = False
    deterministic: bool = False
    spread: float = 1.6  # most of an offset, in pixels, where it is not one of the far ones


Compute = Callable[[Case, Tensors], Tensors]


def noise(count: int, seed: int) -> Tensor:
    """`count` float64 in (-1, 1) that look random: fractions of a fast-growing square."""
    index = torch.arange(1, count + 1, dtype=torch.float64) + 1000.0 * seed
    return torch.frac(torch.sin(index * 12.9898) * 43758.5453)


def make_call(case: Case) -> Tensors:
    """value, offset_mask and grad_output of a case, on the CPU."""
    batch, height, width, groups, depth = case.size
    rules = make_geometry(groups=groups, **case.geometry)
    out_h, out_w = output_size(height, width, rules)
    value = noise(batch * height * width * groups * depth, 1).view(batch, height, width, -1)
    channels = offset_mask_channels(groups, rules.points)
    packed = noise(batch * out_h * out_w * channels, 2).view(batch, out_h, out_w, channels)
    used = packed[..., :groups * 3 * rules.points].unflatten(-1, (groups, -1))
    offsets = used[..., :2 * rules.points]
    offsets.mul_(case.spread)
    offsets[:, 1::3, ::4, :, 1::5] *= 5  # far from their pixel
    offsets[:, ::5, 2::5, :, ::7] = 1.0  # on whole positions, and on the border
    grad = noise(batch * out_h * out_w * groups * depth, 3).view(batch, out_h, out_w, -1)
    if case.with_nan:
        offsets[:, 3::7, 1::6, :, 4] = torch.nan
        value[:, 0, -1, ::5] = torch.nan
        value[:, -1, 2, ::7] = torch.nan
    return value.to(case.dtypes[0]), packed.to(case.dtypes[1]), grad.to(case.dtypes[0])


def gradients(function: Callable[..., Tensor], tensors: Tensors, **options: Any) -> Tensors:
    """Output and gradients of `function` for value, offset_mask and grad_output."""
    value, packed = (tensor.detach().requires_grad_() for tensor in tensors[:2])
    output = function(value, packed, **options)
    return (output.detach(), *torch.autograd.grad(output, (value, packed), tensors[2]))


def error_of(actual: Tensor, exact: Tensor) -> float:
    """Relative error of what is finite; infinite where other elements are NaN."""
    actual, nan = actual.double().cpu(), exact.isnan()
    if not torch.equal(actual.isnan(), nan):
        return float('inf')
    difference = (actual - exact).masked_fill(nan, 0).norm()
    return (difference / exact.masked_fill(nan, 0).norm()).item()


def cases(family: str) -> Iterator[Case]:
    """The calls of a family."""
    kind, _, rest = family.partition(' ')
    every = {**DTYPES, **MIXED}
    if kind == 'direct':
        for name, geometry in DIRECT.items():
            yield Case(name, (2, 15, 17, 3, 16), every[rest], geometry)
        yield Case('3x3 D=70', (3, 5, 11, 2, 70), every[rest], SAME)
        yield Case('3x3 D=3', (1, 7, 5, 6, 3), every[rest], SAME)
        yield Case('3x3 NaN', (2, 15, 17, 3, 8), every[rest], SAME, with_nan=True)
    elif kind == 'deterministic':
        yield Case('3x3', (2, 15, 17, 3, 16), every[rest], SAME, deterministic=True)
    else:
        depth, dtype = rest.split()
        for name, geometry in WINDOW.items():
            for size in ((2, 15, 17, 3), (3, 7, 7, 5), (1, 33, 20, 2)):
                yield Case(f'{name} {"x".join(map(str, size))}', (*size, int(depth[2:])),
                           every[dtype], geometry, fast=True)
            yield Case(f'{name} NaN', (2, 15, 17, 3, int(depth[2:])), every[dtype], geometry,
                       fast=True, with_nan=True)
        # all rows multiplied, and all of them gathered; tiles that are not whole
        for name, spread in (('near', 0.6), ('far', 7.0)):
            for with_nan in (False, True):
                yield Case(f'{name}{" NaN" * with_nan}', (1, 18, 29, 3, int(depth[2:])),
                           every[dtype], SAME, fast=True, spread=spread, with_nan=with_nan)


def families() -> list[str]:
    """Names of all families."""
    return [*(f'direct {dtype}' for dtype in (*DTYPES, *MIXED)),
            *(f'deterministic {dtype}' for dtype in ('f32', 'f16')),
            *(f'window D={depth} {dtype}' for depth in (16, 32, 64)
              for dtype in ('f16', 'bf16', *MIXED)),
            *(f'window D={depth} f32' for depth in (16, 32))]


def on_gpu(case: Case, tensors: Tensors) -> Tensors:
    """Output and gradients of a case by the kernels of this machine's GPU."""
    torch.ops.mmdcnv4._set_cuda_fast('1' if case.fast else '0')
    torch.use_deterministic_algorithms(case.deterministic)
    return gradients(dcnv4, tuple(tensor.cuda() for tensor in tensors), groups=case.size[3],
                     backend='native', **case.geometry)


def allowed_error(case: Case, name: str, dtype: torch.dtype) -> float:
    """Of a result, in norm."""
    if case.fast and case.dtypes[0] == torch.float32:
        return ALLOWED_SPLIT
    if case.fast and name == NAMES[2]:
        return max(ALLOWED[dtype], 1e-5)  # dot products of halves in float32, in any order
    return ALLOWED[dtype]


def check(case: Case, compute: Compute = on_gpu) -> list[dict[str, Any]]:
    """A row for the output and for each gradient.

    Args:
        case: the call.
        compute: gives output, gradient of value and gradient of offset_mask of a case and its
            three tensors (on the CPU); tests put an emulator here.
    """
    tensors = make_call(case)
    exact = gradients(dcnv4_reference, tuple(t.double() for t in tensors), groups=case.size[3],
                      **case.geometry)
    actual = compute(case, tensors)
    again = compute(case, tensors) if case.deterministic else actual
    rows = []
    for name, result, same, right in zip(NAMES, actual, again, exact):
        error, allowed = error_of(result, right), allowed_error(case, name, result.dtype)
        is_right = error <= allowed and (not case.deterministic or torch.equal(result, same))
        rows.append(dict(case=case.name, result=name, error=error, allowed=allowed, ok=is_right))
    return rows


def run_family(family: str, compute: Compute = on_gpu) -> list[dict[str, Any]]:
    """Rows of a family; the last one is marked."""
    rows = [dict(family=family, **row) for case in cases(family) for row in check(case, compute)]
    rows[-1]['last'] = True
    return rows


def run_apart(names: Sequence[str], seconds: float = 120) -> dict[str, list[dict[str, Any]]]:
    """Rows of each family, computed in a child process.

    An illegal access ends a process: the family that it happened in has failed, and another child
    goes on with the next one.

    Args:
        names: families, in order.
        seconds: for all of them; what is not reached by then has failed.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    end, left = time.monotonic() + seconds, list(names)
    while left:
        command = [sys.executable, '-m', 'mmdcnv4.ops.kernel_check', *left]
        reason = ''
        try:
            done = subprocess.run(command, capture_output=True, text=True,
                                  timeout=max(1, end - time.monotonic()))
            output = done.stdout
            if done.returncode != 0:
                reason = done.stderr[-600:] or f'exit code {done.returncode}'
        except subprocess.TimeoutExpired as error:
            output = error.stdout.decode() if isinstance(error.stdout, bytes) else ''
            reason = f'stopped: {seconds:.0f} s are over'
        for line in output.splitlines():
            if line.startswith('{"family"'):
                row = json.loads(line)
                results.setdefault(row['family'], []).append(row)
        complete = [name for name in left if results.get(name, [{}])[-1].get('last')]
        left = left[len(complete):]
        if left:  # the child died in the first of them
            results.setdefault(left[0], []).append(
                dict(family=left[0], ok=False, text=reason or 'no result'))
            left = [] if reason.startswith('stopped') else left[1:]
    return {name: results.get(name, [dict(family=name, ok=False, text='not reached')])
            for name in names}


def is_good(rows: Sequence[dict[str, Any]]) -> bool:
    """Whether a family passed."""
    return all(row['ok'] for row in rows)


def table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Lines of text: a family each, its largest errors as parts of what is allowed."""
    lines = [f'{"family":24} {"":6} ' + ' '.join(f'{name:>16}' for name in NAMES)
             + '   (largest error / allowed)']
    for family, rows in results.items():
        worst = [max((row['error'] / row['allowed'] for row in rows if row.get('result') == name),
                     default=float('nan')) for name in NAMES]
        lines.append(f'{family:24} {"ok" if is_good(rows) else "FAILED":6} '
                     + ' '.join(f'{value:16.2f}' for value in worst))
        lines += [f'    {row.get("case", "")} {row.get("result", "")}: '
                  + (row.get('text') or f'error {row["error"]:.3g}, allowed {row["allowed"]:.3g}')
                  for row in rows if not row['ok']][:4]
    return lines


def why_not() -> str:
    """Why nothing can be checked here; empty if it can."""
    if not torch.cuda.is_available():
        return f'torch {torch.__version__} sees no GPU'
    if 'cuda' not in _extension.build_info:
        return f'no CUDA kernels: {_extension.missing_reason or "they were not compiled"}'
    return ''


def check_and_remember() -> int:
    """Checks all families, prints a table and keeps the verdict; 1 if one is wrong."""
    reason = why_not()
    if reason:
        print(f'mmdcnv4: there is nothing to check: {reason}', file=sys.stderr)
        return 1
    major, minor = torch.cuda.get_device_capability()
    names = families() if (major, minor) >= (8, 0) else \
        [name for name in families() if not name.startswith('window')]
    started = time.monotonic()
    results = run_apart(names)
    print('\n'.join(table(results)))
    failed = [family for family, rows in results.items() if not is_good(rows)]
    print(f'{len(results) - len(failed)} of {len(results)} families are right, '
          f'{time.monotonic() - started:.0f} s'
          + (f'; wrong: {", ".join(failed)}' if failed else ''))
    path = proven.write_verdict(_extension.build_info['cuda']['kernels'], 10 * major + minor,
                                torch.cuda.get_device_name(), not failed)
    print(f'verdict kept in {path}: tensor-core kernels '
          + ('off on this GPU; please report the table' if failed else
             'on' if (major, minor) >= (8, 0) else 'need sm_80 or newer'))
    return 1 if failed else 0


def main(argv: Sequence[str]) -> int:
    """Prints JSON lines for the families of `argv`, computed in this process; default: all."""
    for family in argv or families():
        for row in run_family(family):
            print(json.dumps(row), flush=True)
    return 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
