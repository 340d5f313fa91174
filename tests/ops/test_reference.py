# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The specification itself: against numbers worked by hand, plain loops and other formulations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from mmdcnv4.ops import dcnv4_reference
from mmdcnv4.ops.contract import make_geometry
from mmdcnv4.testing import GEOMETRIES, dcnv4_grid_sample, forward_backward, make_inputs

SAME = dict(kernel_size=3, groups=1, padding=1)


def ramp(height=3, width=3):
    """Pixel (y, x) holds 10 * y + x + 1, which no transposition leaves unchanged."""
    rows, columns = torch.arange(height), torch.arange(width)
    return (10. * rows[:, None] + columns + 1)[None, :, :, None]


def packed(height, width, offset=(0., 0.), masks=(), points=9):
    """One group: the same offset for all taps, and the masks."""
    offset_mask = torch.zeros(1, height, width, -(-3 * points // 8) * 8)
    offset_mask[..., 0:2 * points:2], offset_mask[..., 1:2 * points:2] = offset
    offset_mask[..., 2 * points:3 * points] = torch.tensor(masks)
    return offset_mask


def one_hot(tap):
    return [float(k == tap) for k in range(9)]


def box_sum(image, dilation=1):
    """3 x 3 sums with zero padding, of (1, H, W, 1)."""
    weight = torch.ones(1, 1, 3, 3)
    return F.conv2d(image.permute(0, 3, 1, 2), weight, padding=dilation,
                    dilation=dilation).permute(0, 2, 3, 1)


def test_half_pixel_offset_by_hand():
    # the centre tap moved half a pixel right and a quarter down: 1 2 3 / 11 12 13 / 21 22 23
    out = dcnv4_reference(ramp(), packed(3, 3, (0.5, 0.25), one_hot(4)), **SAME)[0, :, :, 0]
    expected = torch.tensor([[4.0, 5.0, 2.75],          # 0.75 * 1.5 + 0.25 * 11.5, ...
                             [14.0, 15.0, 7.75],        # right edge: half of a column of zeros
                             [0.75 * 21.5, 0.75 * 22.5, 0.75 * 11.5]])  # lower edge: 3/4 rows
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)


def test_gradients_by_hand():
    value = ramp().requires_grad_()
    offset_mask = torch.zeros(1, 1, 1, 8)  # kernel 1 x 1, stride 3: the pixel (0, 0) alone
    offset_mask[0, 0, 0, :3] = torch.tensor([1.5, 0.25, 2.0])
    offset_mask.requires_grad_()
    out = dcnv4_reference(value, offset_mask, kernel_size=1, groups=1, stride=3)
    assert out.item() == 2 * (0.75 * 2.5 + 0.25 * 12.5)
    grad_value, grad = torch.autograd.grad(out, (value, offset_mask))
    expected = torch.zeros(3, 3)
    expected[:2, 1:] = 2 * torch.tensor([[0.375, 0.375], [0.125, 0.125]])
    assert torch.equal(grad_value[0, :, :, 0], expected)
    assert grad.flatten().tolist() == [2 * 1, 2 * 10, 5.0, 0, 0, 0, 0, 0]  # slopes 1 and 10


@pytest.mark.parametrize('tap', range(9))
def test_taps_run_column_by_column(tap):
    out = dcnv4_reference(ramp(), packed(3, 3, masks=one_hot(tap)), **SAME)
    dx, dy = tap // 3 - 1, tap % 3 - 1
    padded = F.pad(ramp()[0, :, :, 0], (1, 1, 1, 1))
    assert torch.equal(out[0, :, :, 0], padded[1 + dy:4 + dy, 1 + dx:4 + dx])


def test_one_hot_centre_is_the_identity():
    value = torch.randn(2, 5, 7, 6)
    offset_mask = packed(5, 7, masks=one_hot(4)).expand(2, -1, -1, -1)
    assert torch.equal(dcnv4_reference(value, offset_mask, **SAME), value)


def test_unit_masks_are_a_box_sum():
    out = dcnv4_reference(ramp(5, 4), packed(5, 4, masks=[1.] * 9), **SAME)
    torch.testing.assert_close(out, box_sum(ramp(5, 4)))


def test_offset_scale_dilates_the_resting_grid():
    out = dcnv4_reference(ramp(5, 4), packed(5, 4, masks=[1.] * 9), offset_scale=2.0, **SAME)
    torch.testing.assert_close(out, box_sum(ramp(5, 4), dilation=2))


def test_softmax_of_equal_masks_is_the_mean():
    out = dcnv4_reference(ramp(5, 4), packed(5, 4, masks=[7.] * 9), softmax=True, **SAME)
    torch.testing.assert_close(out, box_sum(ramp(5, 4)) / 9)


def test_padding_channels_are_not_read():
    offset_mask = packed(3, 3, (0.5, 0.25), one_hot(4))
    expected = dcnv4_reference(ramp(), offset_mask, **SAME)
    offset_mask[..., 27:] = math.nan
    assert torch.equal(dcnv4_reference(ramp(), offset_mask, **SAME), expected)


def pixel(image, y, x):
    inside = 0 <= y < len(image) and 0 <= x < len(image[0])
    return image[y][x] if inside else 0.0


def plain_loops(value, offset_mask, groups, **geometry):
    """The formula of the operator, one number at a time, on nested lists."""
    rules = make_geometry(groups=groups, **geometry)
    (kh, kw), (th, tw), (ph, pw) = rules.kernel_size, rules.stride, rules.padding
    (dh, dw), points = rules.dilation, rules.points
    ch, cw, s = dh * (kh - 1) // 2, dw * (kw - 1) // 2, rules.offset_scale
    depth = value.shape[3] // groups
    out = torch.zeros(*offset_mask.shape[:3], value.shape[3], dtype=torch.float64)
    for n, ho, wo, c in torch.cartesian_prod(*map(torch.arange, out.shape)).tolist():
        image = value[n, :, :, c].tolist()
        packed = offset_mask[n, ho, wo, 3 * points * (c // depth):].tolist()
        masks = packed[2 * points:3 * points]
        if rules.softmax:
            masks = [math.exp(m) / sum(map(math.exp, masks)) for m in masks]
        k = 0
        for i in range(kw):
            for j in range(kh):
                if rules.remove_center and (i, j) == (kw // 2, kh // 2):
                    continue
                x = wo * tw - pw + cw + (i * dw - cw + packed[2 * k]) * s
                y = ho * th - ph + ch + (j * dh - ch + packed[2 * k + 1]) * s
                x0, y0 = math.floor(x), math.floor(y)
                fx, fy = x - x0, y - y0
                out[n, ho, wo, c] += masks[k] * (
                    (1 - fy) * (1 - fx) * pixel(image, y0, x0)
                    + (1 - fy) * fx * pixel(image, y0, x0 + 1)
                    + fy * (1 - fx) * pixel(image, y0 + 1, x0)
                    + fy * fx * pixel(image, y0 + 1, x0 + 1))
                k += 1
        assert k == points
    return out


@pytest.mark.parametrize('name', GEOMETRIES)
def test_plain_loops(name):
    inputs = make_inputs(2, 5, 6, 2, groups=2, **GEOMETRIES[name])
    out = dcnv4_reference(*inputs, groups=2, **GEOMETRIES[name])
    expected = plain_loops(*inputs, groups=2, **GEOMETRIES[name])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('name', GEOMETRIES)
def test_grid_sample_form(name):
    geometry = dict(groups=5, **GEOMETRIES[name])
    inputs = make_inputs(3, 9, 7, 3, **geometry)
    out = dcnv4_reference(*inputs, **geometry)
    grad_output = torch.randn_like(out)
    for actual, expected in zip(forward_backward(dcnv4_reference, inputs, grad_output, **geometry),
                                forward_backward(dcnv4_grid_sample, inputs, grad_output,
                                                 **geometry)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


def by_mmcv(value, offset_mask, groups, **geometry):
    """DCNv2 with all-ones depthwise weights. Its kernels want NCHW-contiguous inputs."""
    from mmcv.ops import modulated_deform_conv2d
    rules = make_geometry(groups=groups, **geometry)
    (kh, kw), points = rules.kernel_size, rules.points
    packed = offset_mask[..., :groups * 3 * points].unflatten(-1, (groups, 3 * points))
    offset, mask = packed[..., :2 * points].unflatten(-1, (points, 2)), packed[..., 2 * points:]
    mask = mask.softmax(-1) if rules.softmax else mask
    taps = torch.tensor([[i * rules.dilation[1] - rules.center[1],
                          j * rules.dilation[0] - rules.center[0]] for j, i in rules.taps()])
    offset = rules.offset_scale * offset + (rules.offset_scale - 1) * taps
    row_major = torch.tensor([i * kh + j for j in range(kh) for i in range(kw)])
    offset = offset[..., row_major, :].flip(-1).flatten(3).permute(0, 3, 1, 2)
    mask = mask[..., row_major].flatten(3).permute(0, 3, 1, 2)
    channels = value.shape[3]
    weight = value.new_ones(channels, 1, kh, kw)
    out = modulated_deform_conv2d(
        value.permute(0, 3, 1, 2).contiguous(), offset.contiguous(), mask.contiguous(), weight,
        None, rules.stride, rules.padding, rules.dilation, channels, groups)
    return out.permute(0, 2, 3, 1)


@pytest.mark.parametrize('name', [name for name in GEOMETRIES if 'ring' not in name])
def test_mmcv_modulated_deform_conv(name):
    pytest.importorskip('mmcv.ops', reason='mmcv is not installed with its operators')
    geometry = dict(groups=2, **GEOMETRIES[name])
    inputs = make_inputs(2, 9, 7, 3, **geometry)
    grad_output = torch.randn(*inputs.offset_mask.shape[:3], 6, dtype=torch.float64)
    for actual, expected in zip(forward_backward(dcnv4_reference, inputs, grad_output, **geometry),
                                forward_backward(by_mmcv, inputs, grad_output, **geometry)):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize('name, fast_mode', [('3x3-strided', False), ('3x5-ring', True),
                                             ('2x4', True), ('3x3-softmax', True)])
def test_gradcheck(name, fast_mode):
    inputs = make_inputs(2, 5, 5, 2, groups=2, **GEOMETRIES[name])
    assert torch.autograd.gradcheck(
        lambda *tensors: dcnv4_reference(*tensors, groups=2, **GEOMETRIES[name]),
        tuple(inputs.leaves(torch.float64, torch.float64)), fast_mode=fast_mode)


@pytest.mark.parametrize('name', ['3x3-strided', '3x3-softmax'])
def test_gradgradcheck(name):
    inputs = make_inputs(1, 3, 5, 2, groups=1, **GEOMETRIES[name])
    assert torch.autograd.gradgradcheck(
        lambda *tensors: dcnv4_reference(*tensors, groups=1, **GEOMETRIES[name]),
        tuple(inputs.leaves(torch.float64, torch.float64)), fast_mode=True)


@pytest.mark.hostile
@pytest.mark.parametrize('position', [math.nan, math.inf, -math.inf, 1e9, -1e9])
def test_a_sample_nowhere_counts_as_zero(position):
    value, offset_mask = ramp().requires_grad_(), packed(3, 3, (0.5, 0.25), [1.] * 9)
    offset_mask[..., 6] = position  # dx of tap 3
    without = offset_mask.clone()
    without[..., 2 * 9 + 3] = 0
    offset_mask.requires_grad_()
    out = dcnv4_reference(value, offset_mask, **SAME)
    torch.testing.assert_close(out, dcnv4_reference(value, without, **SAME))
    grad_value, grad = torch.autograd.grad(out.sum(), (value, offset_mask))
    assert grad_value.isfinite().all()
    assert grad.isfinite().all()
    assert torch.equal(grad[..., [6, 7, 18 + 3]], torch.zeros(1, 3, 3, 3))


@pytest.mark.hostile
@pytest.mark.parametrize('x, y', [(2.5, 1.25), (-0.5, 1.25), (1.5, -0.25), (2.75, 2.5), (7, 1)])
def test_a_missing_corner_is_no_pixel(x, y):
    """Samples partly outside; what they do not touch is NaN, and 0 * NaN appears nowhere."""
    value = torch.full((1, 3, 3, 2), math.nan)
    for line in {math.floor(y), math.floor(y) + 1} & {0, 1, 2}:
        for column in {math.floor(x), math.floor(x) + 1} & {0, 1, 2}:
            value[0, line, column] = torch.randn(2)
    offset_mask = torch.zeros(1, 1, 1, 8)
    offset_mask[..., :3] = torch.tensor([x, y, 2.0])
    value.requires_grad_(), offset_mask.requires_grad_()
    out = dcnv4_reference(value, offset_mask, kernel_size=1, groups=1, stride=3)
    assert out.isfinite().all()
    for grad in torch.autograd.grad(out.sum(), (value, offset_mask)):
        assert grad.isfinite().all()


def test_half_inputs_are_rounded_once():
    inputs = make_inputs(1, 5, 6, 4, groups=2, dtype=torch.float16, kernel_size=5, padding=2)
    out = dcnv4_reference(*inputs, kernel_size=5, padding=2, groups=2)
    wide = dcnv4_reference(inputs.value.float(), inputs.offset_mask.float(), kernel_size=5,
                           padding=2, groups=2)
    assert out.dtype == torch.float16
    assert torch.equal(out, wide.half())


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')
@pytest.mark.parametrize('geometry', [dict(padding=1), dict(stride=(2, 1), padding=(1, 2))])
def test_a_trace_serves_other_sizes(geometry):
    """So does the file of the tracing exporter of ONNX: test_onnx.py."""
    geometry = dict(geometry, kernel_size=3, groups=2)
    first, other = (make_inputs(batch, *size, 8, **geometry)
                    for batch, size in ((1, (5, 5)), (2, (7, 9))))
    traced = torch.jit.trace(lambda *tensors: dcnv4_reference(*tensors, **geometry),
                             (first.value, first.offset_mask), check_trace=False)
    assert torch.equal(traced(other.value, other.offset_mask),
                       dcnv4_reference(other.value, other.offset_mask, **geometry))
