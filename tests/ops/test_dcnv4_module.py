# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The layer: parameter names, start values, strides, options, copies, training."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle

import pytest
import torch
from torch import nn

from mmdcnv4.ops import DCNv4, dcnv4_reference
from mmdcnv4.ops.contract import make_geometry, output_size


def randomised(**options):
    """A layer whose offsets, masks and gates are not zero."""
    layer = DCNv4(**options)
    for name, parameter in layer.named_parameters():
        if 'offset_mask.' in name or 'center' in name or 'bias' in name:
            nn.init.normal_(parameter, std=0.2)
    return layer


@pytest.mark.parametrize('dw, center, remove, bias, without, softmax',
                         itertools.product([None, 3, 5], *[[False, True]] * 5))
def test_state_dict(dw, center, remove, bias, without, softmax):
    """Names and shapes of the published checkpoints."""
    layer = DCNv4(20, kernel_size=3, group=5, dw_kernel_size=dw, center_feature_scale=center,
                  remove_center=remove, output_bias=bias, without_pointwise=without,
                  softmax=softmax)
    packed = 120 if remove else 136  # 3 * 8 * 5, and 3 * 9 * 5 = 135 rounded up
    expected = {'offset_mask.weight': (packed, 20), 'offset_mask.bias': (packed,)}
    if dw is not None:
        expected |= {'offset_mask_dw.weight': (20, 1, dw, dw), 'offset_mask_dw.bias': (20,)}
    if not without:
        expected |= {'value_proj.weight': (20, 20), 'value_proj.bias': (20,),
                     'output_proj.weight': (20, 20)}
        if bias:
            expected['output_proj.bias'] = (20,)
    if center:
        expected |= {'center_feature_scale_proj_weight': (5, 20),
                     'center_feature_scale_proj_bias': (5,)}
    assert {key: tuple(tensor.shape) for key, tensor in layer.state_dict().items()} == expected


@pytest.mark.parametrize('options', [
    {}, dict(dw_kernel_size=3), dict(without_pointwise=True), dict(stride=2),
    dict(remove_center=True), dict(offset_scale=0.5)])
def test_starts_at_zero_and_only_masks_learn(options):
    layer = DCNv4(16, group=2, **options)
    out = layer(torch.randn(2, 7, 9, 16))
    assert out.eq(0).all()
    out.backward(torch.randn_like(out))
    points = layer.geometry.points
    for parameter in layer.offset_mask.parameters():
        rows = parameter.grad[:6 * points].unflatten(0, (2, 3 * points))
        assert rows[:, :2 * points].eq(0).all()
        assert rows[:, 2 * points:].abs().sum() > 0
        assert parameter.grad[6 * points:].eq(0).all()
    if layer.value_proj is not None:
        assert layer.value_proj.weight.grad.eq(0).all()


def test_mask_init_gives_the_mean_of_the_window():
    layer = DCNv4(4, group=2, without_pointwise=True, mask_init=1 / 9)
    x = torch.randn(2, 5, 7, 4)
    expected = nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 3, 1, 1).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), expected)
    assert layer.offset_mask.bias[-2:].eq(0).all()  # 54 used of 56
    layer.offset_mask.bias.data.normal_()
    layer.init_weights()
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize('kernel_size, pad', [(3, 1), ((5, 3), (2, 1)), (1, 0)])
def test_mask_init_by_name(kernel_size, pad):
    x = torch.randn(2, 5, 7, 4)

    def start(mask_init):
        layer = DCNv4(4, kernel_size, pad=pad, group=2, without_pointwise=True,
                      mask_init=mask_init)
        return layer(x)

    assert not start('zero').any()
    torch.testing.assert_close(start('center'), x)
    size = kernel_size if isinstance(kernel_size, tuple) else (kernel_size, kernel_size)
    torch.testing.assert_close(start('box'), start(1 / (size[0] * size[1])))


@pytest.mark.parametrize('options', [dict(kernel_size=2, pad=0), dict(remove_center=True)])
def test_a_kernel_without_a_middle_tap_has_no_center_start(options):
    with pytest.raises(ValueError, match="mask_init must not be 'center'"):
        DCNv4(4, group=2, mask_init='center', **options)
    with pytest.raises(ValueError, match='mask_init must be a number or one of .*edge'):
        DCNv4(4, group=2, mask_init='edge')
    with pytest.raises(ValueError, match='out_channels must equal channels'):
        DCNv4(4, group=2, without_pointwise=True, out_channels=8)


def test_initialisation():
    layer = DCNv4(256, group=16, dw_kernel_size=5, center_feature_scale=True)
    bound = math.sqrt(6 / 512)  # Xavier-uniform of 256 x 256
    for proj in (layer.value_proj, layer.output_proj):
        assert proj.bias.eq(0).all()
        assert bound * 0.99 < proj.weight.abs().max() <= bound
        assert abs(proj.weight.std().item() * math.sqrt(3) / bound - 1) < 0.02
    bound = math.sqrt(1 / 25)  # torch's default for a convolution with 25 inputs
    assert bound * 0.99 < layer.offset_mask_dw.weight.abs().max() <= bound
    assert 0 < layer.offset_mask_dw.bias.abs().max() <= bound
    assert layer.center_feature_scale_proj_weight.eq(0).all()
    assert layer.center_feature_scale_proj_bias.eq(0).all()


def by_hand(layer, x, predictor_input):
    """The layer's formula, with the reference operator."""
    g = layer.geometry
    value = x if layer.value_proj is None else layer.value_proj(x)
    om = nn.functional.linear(predictor_input, layer.offset_mask.weight, layer.offset_mask.bias)
    out = dcnv4_reference(value, om, kernel_size=g.kernel_size, groups=g.groups, stride=g.stride,
                          padding=g.padding, dilation=g.dilation, offset_scale=g.offset_scale,
                          remove_center=g.remove_center, softmax=g.softmax)
    if layer.center_feature_scale:
        weight, bias = layer.center_feature_scale_proj_weight, layer.center_feature_scale_proj_bias
        depth = layer.channels // g.groups
        gate = torch.stack([torch.sigmoid(out @ weight[c // depth] + bias[c // depth])
                            for c in range(layer.channels)], -1)
        out = out * (1 - gate) + value * gate
    return out if layer.output_proj is None else layer.output_proj(out)


@pytest.mark.parametrize('options', [
    {}, dict(center_feature_scale=True), dict(without_pointwise=True, center_feature_scale=True),
    dict(softmax=True, offset_scale=2.0), dict(remove_center=True, output_bias=False),
    dict(kernel_size=(3, 5), pad=(1, 2)), dict(kernel_size=(1, 9), pad=(0, 4)),
    dict(kernel_size=5, pad=4, dilation=2)])
def test_formula(options):
    """Stride 1 and an output of the size of the input: the predictor sees the input itself."""
    layer = randomised(channels=12, group=3, **options)
    x = torch.randn(2, 7, 9, 12)
    torch.testing.assert_close(layer(x), by_hand(layer, x, x), rtol=1e-5, atol=1e-5)


def test_in_channels():
    layer = randomised(channels=12, in_channels=5, group=3)
    x = torch.randn(2, 7, 9, 5)
    assert layer(x).shape == (2, 7, 9, 12)
    assert layer.value_proj.weight.shape == (12, 5)
    assert layer.offset_mask.weight.shape == (88, 5)
    torch.testing.assert_close(layer(x), by_hand(layer, x, x), rtol=1e-5, atol=1e-5)


STRIDED = [dict(stride=2), dict(stride=(2, 3), kernel_size=(3, 5), pad=(1, 0)),
           dict(stride=2, pad=0), dict(stride=(1, 2), pad=3, dilation=(1, 3)),
           dict(kernel_size=2, stride=2, pad=0), dict(pad=0), dict(pad=2), dict(kernel_size=4),
           dict(kernel_size=7, pad=0, stride=3)]


def window_centers(layer, size):
    """Row and column of the pixel in the middle of each output's window, outside ones as well."""
    g = layer.geometry
    return [[o * g.stride[axis] - g.padding[axis] + g.dilation[axis] * (g.kernel_size[axis] - 1)
             // 2 for o in range(count)] for axis, count in enumerate(output_size(*size, g))]


@pytest.mark.parametrize('options', STRIDED)
def test_predictor_without_convolution_sees_the_window_centre(options):
    layer = randomised(channels=12, group=3, **options)
    x = torch.randn(2, 11, 13, 12)
    rows, columns = window_centers(layer, (11, 13))
    picked = torch.stack([torch.stack([x[:, min(max(r, 0), 10), min(max(c, 0), 12)]
                                       for c in columns], 1) for r in rows], 1)
    torch.testing.assert_close(layer(x), by_hand(layer, x, picked), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('options', STRIDED)
@pytest.mark.parametrize('size', [1, 3, 7])
def test_depthwise_convolution_is_centred_on_the_window(options, size):
    layer = randomised(channels=12, group=3, dw_kernel_size=size, **options)
    x = torch.randn(2, 11, 13, 12)
    rows, columns = window_centers(layer, (11, 13))
    far = 20
    padded = nn.functional.pad(x, (0, 0, far, far, far, far))
    weight, half = layer.offset_mask_dw.weight[:, 0].permute(1, 2, 0), size // 2  # (k, k, C)
    seen = torch.stack([torch.stack([
        (padded[:, r + far - half:r + far + half + 1, c + far - half:c + far + half + 1]
         * weight).sum((1, 2)) for c in columns], 1) for r in rows], 1)
    seen = seen + layer.offset_mask_dw.bias
    torch.testing.assert_close(layer(x), by_hand(layer, x, seen), rtol=1e-4, atol=1e-4)


def test_output_of_one_pixel():
    for dw_kernel_size in (None, 3, 5):
        layer = randomised(channels=4, group=2, pad=0, dw_kernel_size=dw_kernel_size)
        assert layer(torch.randn(2, 3, 3, 4)).shape == (2, 1, 1, 4)


def test_empty_batch_and_strided_input():
    layer = randomised(channels=12, group=3, dw_kernel_size=3)
    assert layer(torch.randn(0, 5, 7, 12)).shape == (0, 5, 7, 12)
    x = torch.randn(2, 12, 5, 7).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x), layer(x.contiguous()))


def test_copies_and_state_dict_round_trip():
    layer = randomised(channels=12, group=3, dw_kernel_size=3, center_feature_scale=True)
    x = torch.randn(2, 5, 7, 12)
    expected = layer(x)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    fresh = DCNv4(12, group=3, dw_kernel_size=3, center_feature_scale=True)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        assert torch.equal(other(x), expected)
        assert not {p.data_ptr() for p in other.parameters()} & {p.data_ptr() for p in
                                                                 layer.parameters()}


def test_repr_names_the_geometry():
    text = repr(DCNv4(12, kernel_size=(3, 5), stride=2, pad=(1, 2), group=3, offset_scale=0.5,
                      softmax=True, in_channels=8))
    for part in ('8, 12', 'kernel_size=(3, 5)', 'stride=(2, 2)', 'pad=(1, 2)', 'group=3',
                 'offset_scale=0.5', 'remove_center=False', 'softmax=True', 'out_features=136'):
        assert part in text


def test_generic_initialisers_leave_the_predictor_alone():
    """mmengine's `init_cfg` picks layers by type; the zero start must survive it."""
    layer = DCNv4(12, group=3)
    for module in layer.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight)
    assert layer.offset_mask.weight.eq(0).all()


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('without', [False, True])
def test_training_under_autocast(dtype, without):
    layer = DCNv4(12, group=3, dw_kernel_size=3, center_feature_scale=True,
                  without_pointwise=without, mask_init=0.1)
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    x, target = torch.randn(2, 5, 7, 12), torch.randn(2, 5, 7, 12)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        with torch.autocast('cpu', dtype):
            out = layer(x)
            loss = (out.float() - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32
               and p.grad.isfinite().all() for p in layer.parameters())
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16, torch.float16])
def test_layer_of_another_dtype(dtype):
    layer = randomised(channels=12, group=3, dw_kernel_size=3).to(dtype)
    out = layer(torch.randn(2, 5, 7, 12, dtype=dtype))
    assert out.dtype == dtype and out.isfinite().all()


def test_gradcheck_of_the_layer():
    layer = randomised(channels=4, group=2, dw_kernel_size=3, stride=(2, 1)).double()
    layer.offset_mask.bias.data[:] += 0.3
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, (x,), fast_mode=True)


def test_geometry_is_that_of_the_operator():
    layer = DCNv4(12, kernel_size=(3, 5), stride=(2, 1), pad=(1, 2), dilation=2, group=3,
                  offset_scale=0.5, remove_center=True)
    assert layer.geometry == make_geometry(
        kernel_size=(3, 5), groups=3, stride=(2, 1), padding=(1, 2), dilation=2, offset_scale=0.5,
        remove_center=True)


@pytest.mark.parametrize('dw_kernel_size', [None, 3])
def test_strides_of_two_sides(dw_kernel_size):
    layer = DCNv4(32, group=2, stride=(2, 3), dw_kernel_size=dw_kernel_size, mask_init=0.1)
    x = torch.randn(2, 9, 11, 32, requires_grad=True)
    out = layer(x)
    assert out.shape == (2, 5, 4, 32)
    out.sum().backward()
    assert x.grad.abs().sum() > 0
