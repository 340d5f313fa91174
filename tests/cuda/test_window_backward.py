# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The tensor-core backward kernels, warp by warp on the CPU, against the reference.

As test_window_kernel.py, for all gradients.
"""

from __future__ import annotations

import pytest
import torch

from helpers.cuda_cases import F16, assert_norms, hostile_offsets, make_call, size_name
from helpers.emulate import ONE_PROCESSOR, THREE, emulate_window, emulate_window_backward
from helpers.window_cases import (
    BACKWARD_WEIGHTS,
    DOTS,
    GEOMETRIES,
    HARD_TO_SPLIT,
    KERNELS,
    SIZES,
    TYPES,
    WINDOW_NORMS,
)
from mmdcnv4.ops import dcnv4_reference, kernel_check
from mmdcnv4.ops.contract import make_geometry
from mmdcnv4.testing import assert_accurate, forward_backward

NAMES = ('grad_value', 'grad_offset_mask')


def assert_window(actual, inputs, grad_output, **geometry):
    """Compares with the reference; weights are rounded."""
    results, dtype = [None, *actual], inputs.value.dtype
    exact = assert_accurate(results, inputs, grad_output, weight_error=BACKWARD_WEIGHTS[dtype],
                            dot_error=DOTS[dtype], **geometry)
    assert_norms(results, exact, WINDOW_NORMS)


def check(emulator, tmp_path, inputs, grad_output, **options):
    """Compares one call with the reference; returns gradients and what was printed."""
    geometry = {key: value for key, value in options.items()
                if key not in ('schedule', 'device', 'count')}
    actual, run = emulate_window_backward(emulator, tmp_path / 'call', inputs, grad_output,
                                          **options)
    assert all(tensor.isfinite().all() for tensor in actual)
    assert_window(actual, inputs, grad_output, **geometry)
    used = 3 * make_geometry(**geometry).points * geometry['groups']
    assert not actual[1][..., used:].any()
    return actual, run


@pytest.mark.parametrize(('family', 'calls'), [
    ('window D=16 f32', slice(1, None, 5)), *(
        pytest.param(name, slice(None), marks=pytest.mark.slow)
        for name in kernel_check.families() if name.startswith('window'))])
def test_kernel_check(emulator, tmp_path, family, calls):
    """The check that a user runs on a GPU accepts right kernels, forward as well."""
    def compute(case, tensors):
        options = dict(groups=case.size[3], **case.geometry)
        gradients, _ = emulate_window_backward(emulator, tmp_path / 'call', tensors[:2],
                                               tensors[2], **options)
        return emulate_window(emulator, tmp_path / 'call', tensors[:2], **options)[0], *gradients

    for case in [*kernel_check.cases(family)][calls]:
        assert kernel_check.is_good(kernel_check.check(case, compute)), case


def near_offsets(inputs, groups, spread):
    """Offsets that keep most samples in reach."""
    used = inputs.offset_mask[..., :27 * groups].unflatten(-1, (groups, 27))
    used[..., :18] = torch.randn(used[..., :18].shape) * spread
    return inputs


@pytest.mark.parametrize(('depth', 'dtypes'), KERNELS)
def test_geometries(emulator, tmp_path, dtypes, depth):
    """Every kernel that is compiled, in turns with the middle tap and without; samples in reach,
    far away and outside the image."""
    is_ring = (depth == 32) != dtypes.startswith('bf16')
    geometry = GEOMETRIES['3x3' + '-ring' * is_ring]
    inputs, grad_output = make_call((1, 5, 9, 3, depth), TYPES[dtypes], geometry)
    _, run = check(emulator, tmp_path, inputs, grad_output, groups=3, **geometry)
    assert run.offset_mask_plan['is_made_for'] and run.value_plan['is_made_for']
    assert run.listed


@pytest.mark.parametrize(('size', 'dtypes'), [
    *zip(SIZES, 4 * ('f16', 'bf16-f32')), *((size, 'f32') for size in SIZES if size[4] < 64)],
                         ids=lambda part: part if isinstance(part, str) else size_name(part))
def test_sizes(emulator, tmp_path, size, dtypes):
    inputs, grad_output = make_call(size, TYPES[dtypes], GEOMETRIES['3x3'])
    check(emulator, tmp_path, inputs, grad_output, groups=size[3], device=ONE_PROCESSOR,
          **GEOMETRIES['3x3'])


@pytest.mark.parametrize('padding', [0, 3])
def test_maps_of_two_sizes(emulator, tmp_path, padding):
    """The output is smaller than the input, or larger, so that it has fewer tiles, or more."""
    geometry = dict(kernel_size=3, padding=padding)
    inputs, grad_output = make_call((1, 9, 10, 2, 16), TYPES['f16'], geometry)
    check(emulator, tmp_path, inputs, grad_output, groups=2, **geometry)


@pytest.mark.parametrize('shared_bytes', [227, 60, 40])
@pytest.mark.parametrize('dtypes', ['f16', 'f16-f32'])
def test_little_shared_memory(emulator, tmp_path, shared_bytes, dtypes):
    """Where a block may have less of it, it gets a smaller tile, and more pixels around it than
    threads."""
    inputs, grad_output = make_call((1, 8, 16, 5, 16), TYPES[dtypes], GEOMETRIES['3x3'])
    _, run = check(emulator, tmp_path, inputs, grad_output, groups=5,
                   device=(1, 48 * 1024, shared_bytes * 1024, 2**31 - 1), **GEOMETRIES['3x3'])
    assert run.value_plan['shared_bytes'] <= shared_bytes * 1024
    tile = {227: (8, 16), 60: (8, 8), 40: (4, 8)}[shared_bytes]
    assert (run.value_plan['tile_h'], run.value_plan['tile_w']) == tile


@pytest.mark.parametrize('dtypes', ['bf16', 'f32'])
def test_several_launches(emulator, tmp_path, dtypes):
    """A grid that holds two blocks: every kernel is launched many times."""
    inputs, grad_output = make_call((5, 3, 5, 2, 16), TYPES[dtypes], GEOMETRIES['3x3'])
    _, run = check(emulator, tmp_path, inputs, grad_output, groups=2,
                   device=(132, 48 * 1024, 227 * 1024, 2), **GEOMETRIES['3x3'])
    assert run.offset_mask_plan['images_per_launch'] == run.value_plan['images_per_launch'] == 2
    assert run.listed


@pytest.mark.parametrize('dtypes', ['f16', 'bf16-f32', 'f32'])
def test_nothing_left_over(emulator, tmp_path, dtypes):
    """Small offsets: the gradient of value is that of its own kernel alone, in any order."""
    inputs, grad_output = make_call((2, 9, 17, 3, 32), TYPES[dtypes], GEOMETRIES['3x3'])
    inputs = near_offsets(inputs, 3, 0.2)
    results = []
    for order in THREE:
        actual, run = check(emulator, tmp_path, inputs, grad_output, groups=3, schedule=order,
                            **GEOMETRIES['3x3'])
        assert not run.listed
        results.append(actual)
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.parametrize('name', ['3x3', '3x3-ring'])
def test_offsets_of_zero(emulator, tmp_path, name):
    """Taps exactly on line or column -1 are in reach and count for nothing: none is left over."""
    inputs, grad_output = make_call((1, 6, 9, 3, 32), TYPES['f16'], GEOMETRIES[name])
    points = make_geometry(groups=3, **GEOMETRIES[name]).points
    used = inputs.offset_mask[..., :9 * points].unflatten(-1, (3, 3 * points))
    used[..., :2 * points] = 0
    _, run = check(emulator, tmp_path, inputs, grad_output, groups=3, **GEOMETRIES[name])
    assert (run.listed, run.has_full) == (0, 0)


def sampled_blocks(offsets, height, width):
    """Of each tap: how many blocks of 4x4 pixels it samples if it is out of reach, else 0."""
    tap = torch.arange(9)
    pixels = (torch.arange(width).view(1, -1, 1, 1), torch.arange(height).view(-1, 1, 1, 1))
    blocks, is_near, is_inside = 1, True, True
    for axis, (pixel, size, rest) in enumerate(
            zip(pixels, (width, height), (tap // 3 - 1, tap % 3 - 1))):
        move = rest + offsets[0, ..., axis].double()
        is_near = is_near & (move >= -2) & (move < 2)
        at = pixel + move
        is_inside = is_inside & (at > -1) & (at < size)
        first = at.floor().clamp(0, size - 1).long() // 4
        last = (at.floor() + 1).clamp(0, size - 1).long() // 4
        blocks = blocks * (1 + (first != last))
    return torch.where(is_inside & ~is_near, blocks, 0)


@pytest.mark.parametrize('dtypes', ['f16-f32', 'f32'])
@pytest.mark.parametrize('spread', [0.5, 1.0, 4.0])
def test_far_taps_are_listed(emulator, tmp_path, spread, dtypes):
    """Each far tap once in the list of each block that it samples, of whichever size."""
    inputs, grad_output = make_call((1, 11, 14, 2, 32), TYPES[dtypes], GEOMETRIES['3x3'])
    inputs = near_offsets(inputs, 2, spread)
    _, run = check(emulator, tmp_path, inputs, grad_output, groups=2, **GEOMETRIES['3x3'])
    offsets = inputs.offset_mask[..., :54].unflatten(-1, (2, 27))[..., :18].unflatten(-1, (9, 2))
    assert run.listed == sampled_blocks(offsets, 11, 14).sum() > 0
    assert not run.has_full


@pytest.mark.parametrize('order', THREE)
@pytest.mark.parametrize('dtypes', ['f16', 'bf16-f32', 'f32'])
def test_full_lists(emulator, tmp_path, dtypes, order):
    """All taps of one group meet in a few cells, more than their lists hold; another group's lists
    have room; NaN reaches what it should."""
    inputs, grad_output = make_call((2, 10, 13, 3, 16), TYPES[dtypes], GEOMETRIES['3x3'])
    used = inputs.offset_mask[..., :81].unflatten(-1, (3, 27))
    tap = torch.arange(9)
    meeting = used[..., 1, :18].unflatten(-1, (9, 2))  # a view
    meeting[..., 0] = 11.25 - torch.arange(13).view(-1, 1) - (tap // 3 - 1)
    meeting[..., 1] = 3.5 - torch.arange(10).view(-1, 1, 1) - (tap % 3 - 1)
    _, run = check(emulator, tmp_path, inputs, grad_output, groups=3, schedule=order,
                   **GEOMETRIES['3x3'])
    assert run.has_full and run.listed > 2 * (1170 - 200)


@pytest.mark.hostile
@pytest.mark.parametrize('dtypes', TYPES)
@pytest.mark.parametrize('name', GEOMETRIES)
def test_hostile_offsets(emulator, tmp_path, name, dtypes):
    """NaN, infinite, huge and whole offsets: nothing but the taps in reach counts."""
    inputs, grad_output = make_call((2, 5, 7, 3, 16), TYPES[dtypes], GEOMETRIES[name])
    inputs = hostile_offsets(inputs, make_geometry(groups=3, **GEOMETRIES[name]).points)
    _, run = check(emulator, tmp_path, inputs, grad_output, groups=3, **GEOMETRIES[name])
    assert run.listed


@pytest.mark.hostile
@pytest.mark.parametrize('dtypes', ['f16', 'bf16-f32', 'f32'])
@pytest.mark.parametrize('where', ['value', 'grad_output', 'mask'])
def test_numbers_that_are_nan(emulator, tmp_path, dtypes, where):
    """NaN goes as far as in the reference, though products meet it with every row and cell."""
    options = dict(GEOMETRIES['3x3'], groups=2)
    inputs, grad_output = make_call((2, 9, 7, 2, 16), TYPES[dtypes], GEOMETRIES['3x3'])
    inputs = hostile_offsets(inputs, make_geometry(**options).points)
    mask = inputs.offset_mask[..., :54].unflatten(-1, (2, 27))[..., 18:]
    for y, x in ((0, 6), (8, 0), (8, 6), (4, 3)):
        if where == 'value':
            inputs.value[:, y, x] = torch.nan
        elif where == 'grad_output':
            grad_output[:, y, x, ::3] = torch.nan
        else:
            mask[:, y, x, 0, ::2] = torch.nan
    actual, _ = emulate_window_backward(emulator, tmp_path / 'call', inputs, grad_output,
                                        **options)
    expected = forward_backward(dcnv4_reference, inputs, grad_output, **options)[1:]
    assert any(tensor.isnan().any() for tensor in expected)
    for name, one, other in zip(NAMES, actual, expected):
        assert not other.isnan().all() and torch.equal(one.isnan(), other.isnan()), name
    assert_window(actual, inputs, grad_output, **options)


@pytest.mark.hostile
@pytest.mark.parametrize('where', ['value', 'grad_output', 'mask'])
def test_split_of_what_has_no_room(emulator, tmp_path, where):
    """The largest float32 is infinite in TF32, and NaN may be zero or infinite there: the device
    makes NaN whose bits are all set."""
    options = dict(GEOMETRIES['3x3'], groups=2)
    inputs, grad_output = make_call((1, 13, 9, 2, 16), TYPES['f32'], GEOMETRIES['3x3'])
    inputs = near_offsets(inputs, 2, 0.2)
    mask = inputs.offset_mask[..., :54].unflatten(-1, (2, 27))[..., 18:]
    tensors = dict(value=inputs.value, grad_output=grad_output, mask=mask.transpose(3, 4))
    for tensor in tensors.values():
        tensor.mul_(2.0**-10)
    for i, number in enumerate(HARD_TO_SPLIT):
        tensors[where][0, 3 * i, 4, 2::7] = number
    actual, _ = emulate_window_backward(emulator, tmp_path / 'call', inputs, grad_output,
                                        **options)
    expected = forward_backward(dcnv4_reference, inputs, grad_output, **options)[1:]
    for name, one, other in zip(NAMES, actual, expected):
        assert torch.equal(one.isnan(), other.isnan()) and not other.isinf().any(), name
    assert any(tensor.isnan().any() for tensor in expected)
    assert max(tensor[tensor.isfinite()].abs().max() for tensor in expected) > 1e34
    assert_window(actual, inputs, grad_output, **options)


@pytest.mark.hostile
def test_numbers_that_are_infinite(emulator, tmp_path):
    """They make gradients that are not finite where they meet, and leave all others alone."""
    options = dict(GEOMETRIES['3x3'], groups=2)
    inputs, grad_output = make_call((1, 9, 7, 2, 16), TYPES['bf16'], GEOMETRIES['3x3'])
    inputs = near_offsets(inputs, 2, 0.4)
    inputs.value[0, 1, 5], grad_output[0, 6, 2] = torch.inf, -torch.inf
    actual, _ = emulate_window_backward(emulator, tmp_path / 'call', inputs, grad_output,
                                        **options)
    expected = forward_backward(dcnv4_reference, inputs, grad_output, **options)[1:]
    for name, one, other in zip(NAMES, actual, expected):
        is_bad = ~other.isfinite()
        assert is_bad.any() and not is_bad.all() and torch.equal(~one.isfinite(), is_bad), name


@pytest.mark.hostile
@pytest.mark.parametrize('content', [float('nan'), 1e4])
def test_padding_of_any_content(emulator, tmp_path, content):
    """Chunks of numbers and units of two groups reach into it."""
    inputs, grad_output = make_call((1, 5, 7, 3, 16), TYPES['f16'], GEOMETRIES['3x3'])
    inputs = near_offsets(inputs, 3, 0.3)
    results = []
    for filling in (0.0, content):
        inputs.offset_mask[..., 81:] = filling
        results.append(emulate_window_backward(emulator, tmp_path / 'call', inputs, grad_output,
                                               groups=3, **GEOMETRIES['3x3'])[0])
    assert all(map(torch.equal, *results))


@pytest.mark.hostile
@pytest.mark.parametrize('dtypes', TYPES)
def test_masks_of_every_size(emulator, tmp_path, dtypes):
    """Weights have the range of float32: each pixel's gradient is as accurate as its own masks
    allow."""
    options = dict(GEOMETRIES['3x3'], groups=2)
    inputs, grad_output = make_call((1, 32, 8, 2, 16), TYPES[dtypes], GEOMETRIES['3x3'])
    inputs = near_offsets(inputs, 2, 0.1)
    sizes = [1e-4, 1.0, 6e4, 1e-2] if inputs.value.dtype == F16 else [1e-30, 1.0, 1e30, 1e-5]
    if inputs.value.dtype == F16:
        grad_output.mul_(1 / 32)
    mask = inputs.offset_mask[..., :54].unflatten(-1, (2, 27))[..., 18:]
    for i, size in enumerate(sizes):
        mask[:, 8 * i:8 * i + 8] = mask[:, 8 * i:8 * i + 8].clamp(-1, 1) * size
    (actual, _), _ = emulate_window_backward(emulator, tmp_path / 'call', inputs, grad_output,
                                             **options)
    assert_window([actual, None], inputs, grad_output, **options)


@pytest.mark.parametrize('dtypes', ['f16', 'bf16', 'f32'])
def test_order_of_threads(emulator, tmp_path, dtypes):
    """Threads in three orders, copies late and early: one result, but for the order of additions
    of what is left over."""
    options = dict(GEOMETRIES['3x3'], groups=5)
    inputs, grad_output = make_call((1, 9, 7, 5, 16), TYPES[dtypes], GEOMETRIES['3x3'])
    inputs = hostile_offsets(inputs, 9)
    grad_output[:, 4, 4] = torch.nan
    results = [emulate_window_backward(emulator, tmp_path / schedule, inputs, grad_output,
                                       schedule=schedule, count=True, **options)
               for schedule in THREE]
    (grad_value, grad_packed), run = results[0]
    assert run.listed and grad_value.isnan().any() and not grad_value.isnan().all()
    for (other_value, other_packed), other_run in results[1:]:
        torch.testing.assert_close(other_packed, grad_packed, rtol=0, atol=0, equal_nan=True)
        # half types are rounded afterwards; in float32 it is the sums themselves that differ
        eps = max(torch.finfo(grad_value.dtype).eps, 1e-5)
        torch.testing.assert_close(other_value, grad_value, rtol=eps, atol=eps, equal_nan=True)
        assert other_run.accesses == run.accesses


@pytest.mark.parametrize('dtypes', ['f16', 'bf16-f32', 'f32'])
def test_two_units_of_a_warp(emulator, tmp_path, dtypes):
    """One after the other in the same memory, without a barrier of the block in between."""
    inputs, grad_output = make_call((1, 16, 32, 4, 16), TYPES[dtypes], GEOMETRIES['3x3'])
    _, run = check(emulator, tmp_path, inputs, grad_output, groups=4, device=ONE_PROCESSOR,
                   **GEOMETRIES['3x3'])
    plan = run.offset_mask_plan
    assert plan['tile_h'] * plan['tile_w'] * 4 / 32 == 2 * plan['threads'] / 32


def accesses_per_unit(emulator, tmp_path, depth, dtypes, spread):
    """Instructions and wavefronts of shared memory per unit of 32 rows, by phase."""
    groups = 128 // TYPES[dtypes][0].itemsize // depth
    inputs, grad_output = make_call((1, 16, 32, groups, depth), TYPES[dtypes], GEOMETRIES['3x3'])
    inputs = near_offsets(inputs, groups, spread)
    _, run = check(emulator, tmp_path, inputs, grad_output, groups=groups, device=ONE_PROCESSOR,
                   count=True, **GEOMETRIES['3x3'])
    assert all((plan['tile_h'], plan['tile_w']) == (8, 16) for plan in run[:2])
    units = 16 * 32 * groups / 32
    return {phase: (count['instructions'] / units, count['wavefronts'] / units)
            for phase, count in run.accesses.items()}


@pytest.mark.parametrize('dtypes', ['f16', 'f32'])
def test_bank_conflicts(emulator, tmp_path, dtypes):
    """Units of 4x4 pixels, two groups of 32, or two blocks of one in float32: what the layouts were
    designed for, no more."""
    is_float = dtypes == 'f32'
    still = accesses_per_unit(emulator, tmp_path, 32, dtypes, 0)
    # 64 cells, 32 rows, a number at a time; cells of both kernels, 128 bytes each, once. In float32
    # there are twice as many of them, and the gradient of value reads a number at a time
    assert still['collect'] == (64, 64)
    assert still['pixels'] == ((32 + 128, 256) if is_float else (32, 128))
    assert still['taps'] == (36, 36)  # nine taps, four cells
    # nine taps, four cells, read and written, by 15 lanes in 16: 240 output pixels for a tile of
    # 128 input pixels; 25 weights of each
    assert still['scatter'] == (126, 126) and still['clear'] == (50, 50)
    # 12 of 16 lines of weights are in reach of either half of a block, two blocks
    assert still['weights'] == (48, 48)
    # 15 words for each row, or 27: two of 16 pixels share a bank; of 32, four
    words, ways = (27, 4) if is_float else (16, 2)
    assert still['numbers'][0] == 3 * words
    assert still['numbers'][1] <= ways * words + 4 * 2 * words
    # 27 numbers out, row by row, and back, pixel by pixel
    pixels = 32 if is_float else 16
    assert still['finish'][0] == 27 + pixels
    assert still['finish'][1] <= (ways * 27 + pixels if is_float else 80)
    # in random places two rows may want the same bank
    moved = accesses_per_unit(emulator, tmp_path, 32, dtypes, 0.5)
    assert moved['taps'][0] == 36 and moved['taps'][1] <= 75
    assert moved['scatter'][0] == 126 and moved['scatter'][1] <= 350
    for phase in ('copy', 'numbers', 'clear', 'weights', 'pixels', 'collect', 'finish'):
        assert moved[phase] == still[phase], phase


@pytest.mark.parametrize(('depth', 'dtypes'), [(16, 'bf16'), (64, 'bf16'), (16, 'f32')])
def test_no_conflicts_but_in_the_scatter(emulator, tmp_path, depth, dtypes):
    """Other group widths."""
    counts = accesses_per_unit(emulator, tmp_path, depth, dtypes, 0.0)
    assert counts['collect'] == (64, 64) and counts['weights'] == (48, 48)
    assert counts['pixels'] == ((5 * depth, 8 * depth) if dtypes == 'f32' else (depth, 4 * depth))
    assert counts['taps'] == (36, 36) and counts['scatter'][0] == counts['scatter'][1]
