# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Calls that the emulated kernels and the kernels on a GPU are both tried with."""

from __future__ import annotations

import torch

from mmdcnv4.testing import make_inputs

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# (value, offset_mask)
DTYPES = {'f64': (F64, F64), 'f32': (F32, F32), 'f16': (F16, F16), 'bf16': (BF16, BF16),
          'f16-f32': (F16, F32), 'bf16-f32': (BF16, F32)}
# N, H, W, G, D: one image and several, primes, one pixel, ragged groups, every width of D
SIZES = [(3, 5, 7, 3, 16), (2, 13, 1, 5, 8), (3, 1, 1, 3, 32), (2, 3, 11, 2, 70), (3, 7, 5, 1, 1),
         (2, 6, 5, 6, 3), (1, 3, 5, 3, 64), (2, 2, 3, 1, 160), (2, 3, 3, 33, 4), (5, 2, 2, 3, 12)]
FEW = 200  # numbers that make up a norm
# whole numbers are exact in every dtype
SPECIAL = (float('nan'), float('inf'), -float('inf'), 1e9, -1e9, 1e4, -3e4, 0.0, 1.0, -1.0, 2.0,
           -2.0, 5.0, -7.0, -0.0)
# Largest error in norm, of output, gradient of value, gradient of offset_mask; bfloat16 has no room
# for a second rounding, of weights that are not split in two numbers
NORMS = {F64: (1e-13, 1e-13, 1e-13), F32: (2e-6, 2e-6, 2e-6), F16: (3.2e-4, 3.5e-4, 3e-4),
         BF16: (1.8e-3, 1.8e-3, 1.8e-3)}


def size_name(size):
    return 'x'.join(map(str, size))


def make_call(size, dtypes, geometry, seed=0):
    """Inputs and grad_output of one call."""
    batch, height, width, groups, depth = size
    inputs = make_inputs(batch, height, width, depth, groups=groups, dtype=dtypes[0],
                         mask_dtype=dtypes[1], seed=seed, **geometry)
    shape = (*inputs.offset_mask.shape[:3], inputs.value.shape[3])
    return inputs, torch.randn(shape, dtype=F64).to(dtypes[0])


def hostile_offsets(inputs, points):
    """Replaces a third of the offsets by the worst there are."""
    special = torch.tensor(SPECIAL, dtype=F64)
    packed = inputs.offset_mask.double()
    groups = packed.shape[-1] // (3 * points)
    used = packed[..., :groups * 3 * points].unflatten(-1, (groups, -1))
    offsets = used[..., :2 * points]
    chosen = torch.rand(offsets.shape) < 1 / 3
    offsets[chosen] = special[torch.randint(len(special), (int(chosen.sum()),))]
    return inputs._replace(offset_mask=packed.to(inputs.offset_mask.dtype))


def assert_norms(actual, exact, norms=None):
    """||actual - exact|| / ||exact|| over what is finite, of what was computed (not None), at most
    as in `norms` (default: NORMS). A bound for each number allows all of them to be rounded by as
    much as there is; in norm the errors of many must be as large as their mean square."""
    norms = norms or NORMS
    for tensor, right, allowed in zip(actual, exact, zip(*norms.values())):
        if tensor is None:
            continue
        is_finite = right.isfinite()
        size = right[is_finite].norm().item()
        error = (tensor.double()[is_finite] - right[is_finite]).norm().item()
        most = dict(zip(norms, allowed))[tensor.dtype]
        # of a few numbers all may be rounded by as much as there is; of many, a few may be large
        count = size**4 / right[is_finite].pow(4).sum().clamp(min=1e-300)
        assert error <= most * size * (1 if count >= FEW else 2), (
            f'error {error / size:.3g} in norm, allowed {most:.3g}')
