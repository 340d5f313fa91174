# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Calls of multi-scale deformable attention, and what they are compared with."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
# (value, locations, weights)
DTYPES = {'f64': (F64, F64, F64), 'f32': (F32, F32, F32), 'f16': (F16, F16, F16),
          'bf16': (BF16, BF16, BF16), 'f16-f32': (F16, F32, F32), 'bf16-f32': (BF16, F32, F32),
          'f16-f32-f16': (F16, F32, F16)}
# batch, queries, heads, channels of a head, points, sizes
SIZES = {
    'one-of-all': (1, 1, 1, 1, 1, [(1, 1)]),
    'odd': (2, 7, 3, 5, 4, [(8, 9), (4, 5), (3, 1)]),
    'tiny-levels': (3, 9, 2, 8, 2, [(1, 1), (1, 3), (2, 1), (1, 1)]),
    'wide': (1, 11, 2, 33, 3, [(5, 4), (1, 6)]),
    'encoder': (2, 17, 2, 32, 2, [(4, 3), (2, 2), (1, 1)]),
    'many-points': (2, 3, 3, 16, 17, [(3, 7), (2, 5)]),
    'crowded': (2, 30, 1, 64, 3, [(2, 3)]),
    'very-wide': (1, 3, 1, 272, 1, [(2, 2), (3, 3)]),
    'many-levels': (1, 2, 1, 4, 1, [(1 + i % 3, 1 + i % 4) for i in range(70)]),
}
# Relative to the norm of the result: rounding to p bits errs by at most 2^-p / sqrt(3) in the mean.
ALLOWED = {F64: 1e-13, F32: 2e-6, F16: 3.2e-4, BF16: 2.5e-3}
NAMES = ('output', 'grad_value', 'grad_locations', 'grad_weights')


class Inputs(NamedTuple):
    """The tensors of a call; `sizes` are (height, width) per level."""

    value: Tensor
    locations: Tensor
    weights: Tensor
    sizes: list[tuple[int, int]]
    grad_output: Tensor


def make_inputs(name, dtypes=(F64, F64, F64), seed=0):
    """A third of the samples touches a border or lies outside its map."""
    batch, queries, heads, channels, points, sizes = SIZES[name] if isinstance(name, str) else name
    generator = torch.Generator().manual_seed(seed)
    pixels = sum(height * width for height, width in sizes)
    layout = (batch, queries, heads, len(sizes), points)
    value = torch.randn(batch, pixels, heads, channels, dtype=F64, generator=generator)
    locations = torch.rand(*layout, 2, dtype=F64, generator=generator) * 1.5 - 0.25
    weights = torch.randn(layout, dtype=F64, generator=generator)
    grad = torch.randn(batch, queries, heads * channels, dtype=F64, generator=generator)
    return Inputs(value.to(dtypes[0]), locations.to(dtypes[1]), weights.to(dtypes[2]), sizes,
                  grad.to(dtypes[0]))


def dense_attention(value, sizes, locations, weights):
    """Every sample as a sum over all pixels of its map: max(0, 1 - distance) along each axis.

    Nothing is looked up and no border is special, so that it shares no step with the kernels.
    """
    total, start = 0, 0
    for level, (height, width) in enumerate(sizes):
        maps = value[:, start:start + height * width].unflatten(1, (height, width))
        start += height * width
        place = locations[:, :, :, level] * locations.new_tensor([width, height]) - 0.5
        along_x = torch.arange(width, dtype=value.dtype) - place[..., :1]  # (B, Q, M, K, W)
        along_y = torch.arange(height, dtype=value.dtype) - place[..., 1:]
        total = total + torch.einsum('bqmk,bqmkx,bqmky,byxmd->bqmd', weights[:, :, :, level],
                                     (1 - along_x.abs()).clamp(min=0),
                                     (1 - along_y.abs()).clamp(min=0), maps)
    return total.flatten(2)


def exact(inputs):
    """Output and gradients in float64, of the tensors as they were rounded."""
    leaves = [tensor.double().requires_grad_() for tensor in inputs[:3]]
    output = dense_attention(leaves[0], inputs.sizes, *leaves[1:])
    grads = torch.autograd.grad(output, leaves, inputs.grad_output.double())
    return [output.detach(), *grads]


def is_smooth(inputs, margin):
    """(B, Q, M, L, K): samples that no rounding moves across a pixel centre."""
    scale = inputs.locations.new_tensor([[w, h] for h, w in inputs.sizes], dtype=F64)
    place = inputs.locations.double() * scale[:, None] - 0.5
    return ((place - place.round()).abs() > margin).all(-1)


def error_of(actual, target):
    """||actual - target|| / ||target||; NaN never passes."""
    difference = (actual.double() - target).norm() / target.norm().clamp(min=1e-30)
    return difference.item() if difference.isfinite() else math.inf


def assert_accurate(actual, inputs, expected=None, factor=1.0):
    """Compares output and gradients, in norm; gradients of locations away from the kinks."""
    expected = exact(inputs) if expected is None else expected
    smooth = is_smooth(inputs, 1e-3)[..., None]
    for name, found, target, like in zip(NAMES, actual, expected,
                                         (inputs.value, *inputs[:3])):
        assert found.dtype == like.dtype, name
        if name == 'grad_locations':
            found, target = found * smooth, target * smooth
        # of a few numbers all may be rounded by as much as there is
        allowed = ALLOWED[like.dtype] * factor * (2 if found.numel() < 100 else 1)
        assert error_of(found, target) <= allowed, (name, error_of(found, target), allowed)
