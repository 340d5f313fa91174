# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The tolerances themselves: wide enough for sums in any order, too narrow for any fault."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmdcnv4.ops import dcnv4_reference
from mmdcnv4.testing import (
    GEOMETRIES,
    assert_matches_reference,
    assert_within,
    dcnv4_grid_sample,
    error_bounds,
    make_inputs,
    random_grad_output,
)

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def call(name='3x3-strided', dtype=torch.float32, softmax=False):
    geometry = dict(GEOMETRIES[name], groups=3, softmax=softmax)
    return make_inputs(2, 9, 7, 8, dtype=dtype, **geometry), geometry


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('name', GEOMETRIES)
def test_a_right_implementation_passes(name, dtype):
    inputs, geometry = call(name, dtype, GEOMETRIES[name].get('softmax', False))
    assert_matches_reference(dcnv4_reference, inputs, **geometry)


@pytest.mark.parametrize('name', ['3x3', '5x5'])
def test_another_formulation_passes(name):
    """Normalised coordinates cost grid_sample a few more roundings of each position."""
    inputs, geometry = call(name)
    out = dcnv4_grid_sample(*inputs, **geometry)
    wide = dcnv4_reference(inputs.value.double(), inputs.offset_mask.double(), **geometry)
    bound = error_bounds(inputs, random_grad_output(inputs), **geometry)[0]
    assert_within(out, wide, 3 * bound)


def numbers(offset_mask):
    """Offsets (..., G, K, 2) and masks (..., G, K): three groups of nine taps."""
    packed = offset_mask[..., :81].unflatten(-1, (3, 27))
    return packed[..., :18].unflatten(-1, (9, 2)), packed[..., 18:]


def packed(offset, mask, offset_mask):
    return torch.cat([torch.cat([offset.flatten(-2), mask], -1).flatten(-2),
                      offset_mask[..., 81:]], -1)


def swapped_axes(value, offset_mask, **geometry):
    offset, mask = numbers(offset_mask)
    return dcnv4_reference(value, packed(offset.flip(-1), mask, offset_mask), **geometry)


def border_off_by_one(value, offset_mask, **geometry):
    """The last column is taken for one beyond the border."""
    return dcnv4_reference(torch.cat([value[:, :, :-1], 0 * value[:, :, -1:]], 2), offset_mask,
                           **geometry)


def no_mask_gradient(value, offset_mask, **geometry):
    offset, mask = numbers(offset_mask)
    return dcnv4_reference(value, packed(offset, mask.detach(), offset_mask), **geometry)


def no_offset_gradient(value, offset_mask, **geometry):
    offset, mask = numbers(offset_mask)
    return dcnv4_reference(value, packed(offset.detach(), mask, offset_mask), **geometry)


def wrong_group_stride(value, offset_mask, **geometry):
    offset, mask = numbers(offset_mask)
    return dcnv4_reference(value, packed(offset.roll(1, -3), mask.roll(1, -2), offset_mask),
                           **geometry)


def dropped_tail_channel(value, offset_mask, **geometry):
    out = dcnv4_reference(value, offset_mask, **geometry)
    return torch.cat([out[..., :-1], 0 * out[..., -1:]], -1)


def dropped_tap(value, offset_mask, **geometry):
    offset, mask = numbers(offset_mask)
    return dcnv4_reference(value, packed(offset, torch.cat([mask[..., :8], 0 * mask[..., 8:]], -1),
                                         offset_mask), **geometry)


def positions_of_few_digits(value, offset_mask, **geometry):
    """Of the third part of the digits that the offsets have."""
    offset, mask = numbers(offset_mask)
    digits = 2.0**(11 if offset.dtype in (torch.float64, torch.float32) else 3)
    rounded = (offset.detach() * digits).round() / digits
    return dcnv4_reference(value, packed(offset + (rounded - offset.detach()), mask, offset_mask),
                           **geometry)


FAULTS = [swapped_axes, border_off_by_one, no_mask_gradient, no_offset_gradient,
          wrong_group_stride, dropped_tail_channel, dropped_tap, positions_of_few_digits]


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('softmax', [False, True])
@pytest.mark.parametrize('fault', FAULTS)
def test_a_fault_is_found(fault, softmax, dtype):
    inputs, geometry = call(dtype=dtype, softmax=softmax)
    with pytest.raises(AssertionError, match='numbers are too far off'):
        assert_matches_reference(fault, inputs, **geometry)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_sums_in_half_precision_are_found(dtype):
    """Each number has a bound of its own: small results of large terms show it."""
    inputs, geometry = call('5x5', dtype)
    exact = dcnv4_reference(inputs.value.double(), inputs.offset_mask.double(), **geometry)
    bound = error_bounds(inputs, random_grad_output(inputs), **geometry)[0]
    assert_within(exact.to(dtype), exact, bound)
    # half of the sum rounded before the other half is added
    packed = inputs.offset_mask[..., :225].unflatten(-1, (3, 75))
    halves = []
    for taps in (slice(50, 62), slice(62, 75)):
        mask = inputs.offset_mask.clone()
        mask[..., :225].unflatten(-1, (3, 75))[..., 50:] = 0
        mask[..., :225].unflatten(-1, (3, 75))[..., taps] = packed[..., taps]
        halves.append(dcnv4_reference(inputs.value, mask, **geometry))
    with pytest.raises(AssertionError, match='numbers are too far off'):
        assert_within(halves[0] + halves[1], exact, bound)


@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
def test_numbers_that_are_not_finite(bad):
    exact, bound = torch.ones(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    one_is_bad = torch.tensor([1, bad, 1], dtype=torch.float64)
    for actual, right in ((one_is_bad, exact), (exact, one_is_bad)):
        with pytest.raises(AssertionError, match='other numbers are not finite'):
            assert_within(actual, right, bound)
    assert_within(one_is_bad, one_is_bad, bound)
    with pytest.raises(AssertionError, match='1 of 3 numbers are too far off'):
        assert_within(exact, exact, torch.tensor([1, float('nan'), 1], dtype=torch.float64))


SHORT = ('test_geometries and f32-f32 or test_many_taps or test_golden or test_equals_mmcv or '
         'test_a_right_implementation or test_plain_loops')


@pytest.mark.parametrize('capability', ['default', 'avx2'])
def test_other_instruction_sets_of_torch(capability, native):
    """In which order the reference adds up depends on the instructions that torch chooses."""
    if torch.backends.cpu.get_cpu_capability() == capability.upper():
        pytest.skip('that is what this run has')
    if capability == 'avx2' and torch.backends.cpu.get_cpu_capability() == 'DEFAULT':
        pytest.skip('this processor has no AVX2')
    code = ('import sys, pytest, torch\n'
            f'assert torch.backends.cpu.get_cpu_capability() == {capability.upper()!r}\n'
            'sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "tests/ops", "-k", '
            f'{SHORT!r}]))')
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True,
                            env=dict(os.environ, ATEN_CPU_CAPABILITY=capability),
                            cwd=Path(__file__).parents[2], timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
