# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Values of the compiled kernels, per instruction set, against the reference and golden numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdcnv4.ops import dcnv4, dcnv4_reference
from mmdcnv4.testing import (
    GEOMETRIES,
    Inputs,
    assert_accurate,
    assert_within,
    cpu_threads,
    error_bounds,
    make_inputs,
    random_grad_output,
)

GOLDEN = Path(__file__).parents[1] / 'data' / 'dcnv4_op.npz'
SAME = dict(kernel_size=3, padding=1)
# (value, offset_mask)
DTYPES = [(torch.float64, torch.float64), (torch.float32, torch.float32),
          (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
          (torch.float16, torch.float32), (torch.bfloat16, torch.float32)]
SHORT = {torch.float64: 'f64', torch.float32: 'f32', torch.float16: 'f16', torch.bfloat16: 'bf16'}


def dtype_name(dtype):
    return SHORT[dtype]


def native(*inputs, **geometry):
    return dcnv4(*inputs, backend='native', **geometry)


def assert_forward(inputs, **geometry):
    """The forward half of `assert_matches_reference`, for large or many shapes."""
    out = native(*inputs, **geometry)
    assert out.is_contiguous() and out.dtype == inputs.value.dtype
    assert_accurate([out], inputs, random_grad_output(inputs), **geometry)


@pytest.mark.parametrize('value_dtype, mask_dtype', DTYPES, ids=dtype_name)
@pytest.mark.parametrize('name', GEOMETRIES)
def test_geometries(instruction_set, name, value_dtype, mask_dtype):
    geometry = dict(groups=5, **GEOMETRIES[name])
    inputs = make_inputs(3, 9, 7, 6, dtype=value_dtype, mask_dtype=mask_dtype, **geometry)
    assert_forward(inputs, **geometry)


@pytest.mark.parametrize('groups', [1, 5, 7, 20])
@pytest.mark.parametrize('group_channels', [1, 3, 8, 10, 16, 20, 32, 48, 64, 70, 129])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=dtype_name)
def test_widths(instruction_set, groups, group_channels, dtype):
    geometry = dict(groups=groups, **GEOMETRIES['3x3-strided'])
    assert_forward(make_inputs(2, 3, 5, group_channels, dtype=dtype, **geometry), **geometry)


@pytest.mark.parametrize('kernel_size', [7, 11, (1, 16), (12, 12), (13, 12)])
def test_many_taps(instruction_set, kernel_size):
    geometry = dict(groups=3, kernel_size=kernel_size, padding=6, dilation=(2, 1))
    assert_forward(make_inputs(1, 13, 9, 10, dtype=torch.float32, reach=8, **geometry), **geometry)


@pytest.mark.parametrize('width', [1, 2, 15, 16, 17, 31, 33, 145])
def test_rows_of_any_length(instruction_set, width):
    """Output rows that do not divide into the blocks in which the kernel works."""
    geometry = dict(groups=1, **SAME)
    assert_forward(make_inputs(2, 3, width, 4, dtype=torch.float32, **geometry), **geometry)


def test_empty_batch(instruction_set):
    out = native(torch.empty(0, 5, 7, 6), torch.empty(0, 5, 7, 56), groups=2, **SAME)
    assert out.shape == (0, 5, 7, 6)


def test_batch_of_257(instruction_set):
    geometry = dict(groups=2, **SAME)
    assert_forward(make_inputs(257, 2, 3, 4, dtype=torch.float32, **geometry), **geometry)


def test_eighty_groups_of_sixteen(instruction_set):
    geometry = dict(groups=80, **SAME)
    assert_forward(make_inputs(2, 3, 5, 16, dtype=torch.float32, **geometry), **geometry)


def test_batch_elements_are_single_images(instruction_set):
    """Prime H * W: no tile of queries ends at the border of an image."""
    geometry = dict(groups=2, **SAME)
    inputs = make_inputs(3, 13, 1, 16, dtype=torch.float32, **geometry)
    out = native(*inputs, **geometry)
    for n in range(3):
        single = native(inputs.value[n:n + 1], inputs.offset_mask[n:n + 1], **geometry)
        assert torch.equal(out[n:n + 1], single)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(native(inputs.value[order], inputs.offset_mask[order], **geometry),
                       out[order])


def strided_copy(tensor):
    """The same numbers, cut out of a larger tensor whose axes are permuted; NaN elsewhere."""
    sizes = [2 * tensor.shape[axis] + 3 for axis in (2, 0, 3, 1)]
    large = tensor.new_full(sizes, math.nan).permute(1, 3, 0, 2)
    return large[tuple(slice(2, 2 + 2 * size, 2) for size in tensor.shape)].copy_(tensor)


@pytest.mark.hostile
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16], ids=dtype_name)
def test_strided_inputs(instruction_set, dtype):
    geometry = dict(groups=2, **GEOMETRIES['3x3-strided'])
    inputs = make_inputs(3, 5, 7, 5, dtype=dtype, **geometry)
    expected = native(*inputs, **geometry)
    cut = [strided_copy(tensor) for tensor in inputs]
    assert not any(tensor.is_contiguous() for tensor in cut)
    assert torch.equal(native(*cut, **geometry), expected)
    channels_first = [t.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for t in inputs]
    assert torch.equal(native(*channels_first, **geometry), expected)
    broadcast = [tensor[:1].expand(3, -1, -1, -1) for tensor in inputs]
    torch.testing.assert_close(native(*broadcast, **geometry), expected[:1].expand(3, -1, -1, -1),
                               rtol=0, atol=0)


@pytest.mark.hostile
def test_storage_offset_breaks_the_alignment(instruction_set):
    geometry = dict(groups=2, **SAME)
    inputs = make_inputs(1, 5, 7, 16, dtype=torch.float32, **geometry)
    shifted = [torch.cat([torch.zeros(1), t.flatten()])[1:].view(t.shape) for t in inputs]
    assert shifted[0].data_ptr() % 16 != 0 and shifted[0].is_contiguous()
    assert torch.equal(native(*shifted, **geometry), native(*inputs, **geometry))


@pytest.mark.parametrize('case', range(6))
def test_golden(instruction_set, case):
    """Numbers of the released kernel, compiled for the CPU with one query per block."""
    with np.load(GOLDEN) as golden:
        options = json.loads(str(golden['cases']))[case]
        value, offset_mask, expected = (torch.from_numpy(golden[f'{name}{case}'])
                                        for name in ('value', 'offset_mask', 'output'))
    assert options.pop('group_channels') * options['group'] == value.shape[3]
    options['groups'] = options.pop('group')
    out = native(value, offset_mask, **options)
    inputs = Inputs(value, offset_mask)
    bound = error_bounds(inputs, random_grad_output(inputs), **options)[0]
    assert_within(out, expected.double(), 2 * bound)  # both err


@pytest.mark.parametrize('threads', [2, 3])
def test_threads_do_not_change_a_bit(instruction_set, threads):
    geometry = dict(groups=5, **SAME)
    inputs = make_inputs(3, 29, 31, 16, dtype=torch.float32, **geometry)
    with cpu_threads(1):
        expected = native(*inputs, **geometry)
    with cpu_threads(threads):
        for _ in range(3):
            assert torch.equal(native(*inputs, **geometry), expected)


def one_tap(x, y, height=4, width=5, mask=1.0, channels=3):
    """One 1 x 1 tap per output position, all of them at (x, y). Returns value, offset_mask."""
    value = torch.randn(1, height, width, channels)
    columns, rows = torch.arange(width), torch.arange(height)[:, None]
    offset_mask = torch.zeros(1, height, width, 8)
    offset_mask[..., 0], offset_mask[..., 1], offset_mask[..., 2] = x - columns, y - rows, mask
    return value, offset_mask


@pytest.mark.hostile
@pytest.mark.parametrize('y', [-2., -1., 0., 1., 3., 4., 5.])
@pytest.mark.parametrize('x', [-2., -1., 0., 2., 4., 5., 6.])
def test_integer_positions_and_borders(instruction_set, x, y):
    value, offset_mask = one_tap(x, y)
    out = native(value, offset_mask, kernel_size=1, groups=1)
    inside = 0 <= x < 5 and 0 <= y < 4
    expected = value[0, int(y), int(x)] if inside else torch.zeros(3)
    assert torch.equal(out, expected.expand(1, 4, 5, 3))


@pytest.mark.hostile
@pytest.mark.parametrize('x, y', [(-0.5, 10.5), (55.5, 10.5), (32.5, -0.5), (32.5, 19.5)])
def test_one_tap_strays_over_a_border(instruction_set, x, y):
    """From the middle of a map, where a whole block of outputs rests away from the borders."""
    geometry = dict(groups=1, **SAME)
    inputs = make_inputs(3, 20, 56, 4, dtype=torch.float32, **geometry)
    inputs.offset_mask[..., :18] = 0.25
    inputs.offset_mask[1, 10, 32, 8:10] = torch.tensor([x - 32, y - 10])  # of the tap in the middle
    assert_forward(inputs, **geometry)


@pytest.mark.hostile
@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf, 1e9, -1e9, 3e38, -3e38, 2**31,
                                 -2**31 - 1])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
def test_samples_nowhere(instruction_set, axis, bad, dtype):
    """Their taps count as zero, the other taps as ever."""
    geometry = dict(groups=3, **GEOMETRIES['3x3-strided'])
    inputs = make_inputs(2, 7, 9, 5, dtype=dtype, **geometry)
    without = inputs.offset_mask.clone()
    inputs.offset_mask[..., 27 + 2 * 4 + axis] = bad
    without[..., 27 + 18 + 4] = 0
    assert torch.equal(native(*inputs, **geometry), native(inputs.value, without, **geometry))


@pytest.mark.hostile
def test_everything_nan_is_zero(instruction_set):
    geometry = dict(groups=2, **SAME)
    offset_mask = torch.full((2, 5, 7, 56), math.nan)
    assert native(torch.full((2, 5, 7, 6), math.nan), offset_mask, **geometry).eq(0).all()


@pytest.mark.hostile
@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_bad_pixels_stay_where_they_are(instruction_set, bad):
    """Between the pixels, pixel (2, 3) reaches exactly 4 x 4 outputs, in its own channel."""
    value = torch.randn(1, 7, 9, 20)
    value[0, 2, 3, 4] = bad
    offset_mask = torch.zeros(1, 7, 9, 56)
    packed = offset_mask[..., :54].unflatten(-1, (2, 27))
    packed[..., :18], packed[..., 18:] = 0.25, 1
    out = native(value, offset_mask, groups=2, **SAME)
    touched = torch.zeros(7, 9, 20, dtype=torch.bool)
    touched[0:4, 1:5, 4] = True
    assert torch.equal(~out[0].isfinite(), touched)


@pytest.mark.hostile
def test_a_bad_pixel_beside_a_missing_corner(instruction_set):
    """Samples left of and above the map see no pixel of its far side or of its first row."""
    value, offset_mask = one_tap(-1.0, -1.0)
    value[...] = math.nan
    assert native(value, offset_mask, kernel_size=1, groups=1).eq(0).all()
    value, offset_mask = one_tap(-0.5, 1.0)
    value[0, :, 1:] = math.nan  # the column that a clamped neighbour would be in
    value[0, 3] = math.nan
    expected = (0.5 * value[0, 1, 0]).expand(1, 4, 5, 3)
    assert torch.equal(native(value, offset_mask, kernel_size=1, groups=1), expected)


@pytest.mark.hostile
@pytest.mark.parametrize('softmax', [False, True])
def test_nan_masks_reach_their_group_alone(instruction_set, softmax):
    geometry = dict(groups=3, softmax=softmax, **SAME)
    inputs = make_inputs(1, 5, 7, 6, dtype=torch.float32, reach=1, **geometry)
    inputs.offset_mask[0, 2, 3, 27 + 18 + 4] = math.nan
    out = native(*inputs, **geometry)
    expected = torch.zeros(1, 5, 7, 18, dtype=torch.bool)
    expected[0, 2, 3, 6:12] = True
    assert torch.equal(out.isnan(), expected)
    # a NaN mask of a sample that lies nowhere counts for nothing, as in the reference
    inputs.offset_mask[0, 2, 3, 27 + 2 * 4] = 1e9
    out = native(*inputs, **geometry)
    reference = dcnv4_reference(*inputs, **geometry)
    assert torch.equal(out.isnan(), reference.isnan())
    assert out.isnan().any() == softmax


@pytest.mark.hostile
@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('offset', [-10., 10.])
def test_samples_outside_along_one_axis_read_nothing(instruction_set, axis, offset):
    """Not even the nearest pixels, which are NaN here."""
    packed = torch.zeros(1, 3, 4, 32)
    packed[..., axis:18:2] = offset
    packed[..., 18:27] = 1
    out = native(torch.full((1, 3, 4, 20), math.nan), packed, groups=1, **SAME)
    assert not out.any()


@pytest.mark.hostile
@pytest.mark.parametrize('tap', [0, 4, 8])
def test_softmax_of_large_logits(instruction_set, tap):
    """The largest one is subtracted first, wherever it stands: no exponential overflows."""
    geometry = dict(groups=2, softmax=True, **SAME)
    inputs = make_inputs(1, 5, 7, 6, dtype=torch.float32, **geometry)
    inputs.offset_mask[..., 18 + tap::27] += 1000
    assert native(*inputs, **geometry).isfinite().all()
    assert_forward(inputs, **geometry)


@pytest.mark.hostile
@pytest.mark.parametrize('scale', [0.0, -1.5, 1e30, 1e300])
def test_extreme_offset_scale(instruction_set, scale):
    geometry = dict(groups=2, offset_scale=scale, **SAME)
    assert_forward(Inputs(torch.randn(2, 5, 7, 6), torch.randn(2, 5, 7, 56)), **geometry)


@pytest.mark.hostile
@pytest.mark.parametrize('geometry', [
    dict(kernel_size=(1024, 1), padding=(600, 0)), dict(kernel_size=(3, 1024), padding=(1, 511)),
    dict(kernel_size=3, padding=2**20, stride=2**20), dict(kernel_size=1, stride=2**30),
    dict(kernel_size=3, padding=2**29, dilation=2**29, stride=2**30),
    dict(kernel_size=3, padding=2**30, dilation=2**30)],
    ids=['tall', 'wide', 'padding', 'stride', 'dilation', 'span'])
def test_extreme_geometry(instruction_set, geometry):
    geometry = dict(groups=1, **geometry)
    inputs = make_inputs(1, 3, 5, 2, **geometry)
    assert_forward(inputs, **geometry)
    assert native(inputs.value.float(), inputs.offset_mask.float(), **geometry).isfinite().all()


@pytest.mark.parametrize('size', [1, 2])
def test_maps_smaller_than_the_kernel(instruction_set, size):
    geometry = dict(groups=2, kernel_size=7, padding=3)
    assert_forward(make_inputs(2, size, 1, 3, dtype=torch.float32, **geometry), **geometry)


def test_right_hand_rule_beside_a_far_pixel(instruction_set):
    """On an integer the right neighbour has weight 0: a large number there must not show."""
    value, offset_mask = one_tap(1.0, 2.0)
    value[0, :, 2] = 3e38
    out = native(value, offset_mask, kernel_size=1, groups=1)
    assert torch.equal(out, value[0, 2, 1].expand(1, 4, 5, 3))


def test_input_is_not_changed(instruction_set):
    geometry = dict(groups=2, softmax=True, **SAME)
    inputs = make_inputs(2, 5, 7, 6, dtype=torch.float32, **geometry)
    copies = [tensor.clone() for tensor in inputs]
    native(*inputs, **geometry)
    assert all(map(torch.equal, inputs, copies))


def test_large_float32_map_positions(instruction_set):
    """Columns far from the origin: float32 positions keep the accuracy of the reference."""
    geometry = dict(groups=1, kernel_size=3, padding=(1, 1))
    assert_forward(make_inputs(1, 1, 1501, 2, dtype=torch.float32, **geometry), **geometry)


def test_instruction_set_is_checked(native):
    with pytest.raises(ValueError, match="instruction set must be one of auto generic.*got sse9"):
        torch.ops.mmdcnv4._set_cpu_instruction_set('sse9')


def test_every_query_reads_its_own_image(instruction_set):
    """One released failure: B = 2, 50 x 84, 16 groups of 16. Constant images tell them apart."""
    value = torch.tensor([1., 100.])[:, None, None, None].expand(2, 50, 84, 256)
    offset_mask = torch.zeros(2, 50, 84, 432)
    offset_mask.view(2, 50, 84, 16, 27)[..., 18 + 4] = 1  # the centre tap
    assert torch.equal(native(value, offset_mask, groups=16, **SAME), value)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=dtype_name)
def test_float32_offsets_of_half_values(instruction_set, dtype):
    """A quarter pixel, 80 pixels away, on a ramp: a half offset cannot say it."""
    value = torch.arange(96.)[:, None].expand(1, 1, 96, 1).to(dtype)
    offset_mask = torch.zeros(1, 1, 96, 8)
    offset_mask[..., 0], offset_mask[..., 2] = 80.03125, 1
    out = native(value, offset_mask, kernel_size=1, groups=1)
    assert out.dtype == dtype
    assert out[0, 0, 0, 0] == torch.tensor(80.03125).to(dtype)
    narrow = native(value.float(), offset_mask.to(dtype), kernel_size=1, groups=1)
    assert abs(narrow[0, 0, 0, 0].item() - 80.03125) >= 1 / 32
