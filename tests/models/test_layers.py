# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Layers as configs name them: the DCNv4 convolution and the layer norm of the neck."""

from __future__ import annotations

import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer, build_norm_layer
from torch import nn

import mmdcnv4  # noqa: F401  (registers)
from mmdcnv4.models.layers.dcnv4_conv import DCNv4Conv2d, default_group
from mmdcnv4.ops import DCNv4


def randomise(layer: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.2)
    return layer


@pytest.mark.parametrize('kernel, stride, padding, dilation', [
    (3, 1, 1, 1), (3, 2, 1, 1), ((3, 5), (2, 1), (1, 0), (1, 2)), (1, 1, 0, 1), (2, 2, 0, 1),
    (7, 3, 2, 2)])
def test_size_of_the_output_is_that_of_a_convolution(kernel, stride, padding, dilation):
    arguments = dict(stride=stride, padding=padding, dilation=dilation)
    layer = build_conv_layer(dict(type='DCNv4', group=3), 8, 12, kernel, **arguments)
    plain = nn.Conv2d(8, 12, kernel, **arguments)
    x = torch.randn(2, 8, 19, 23)
    out = randomise(layer)(x)
    assert out.shape == plain(x).shape
    assert out.is_contiguous() and torch.isfinite(out).all()
    for name in ('in_channels', 'out_channels', 'kernel_size', 'stride', 'padding', 'dilation',
                 'groups', 'transposed', 'output_padding'):
        assert getattr(layer, name) == getattr(plain, name), name


def test_it_is_the_channels_last_layer():
    layer = randomise(build_conv_layer(dict(type='DCNv4', group=2, dw_kernel_size=3), 6, 8, 3,
                                       padding=1, bias=False))
    inner = DCNv4(8, 3, 1, 1, group=2, dw_kernel_size=3, output_bias=False, in_channels=6)
    inner.load_state_dict(layer.state_dict())
    x = torch.randn(3, 6, 7, 10)
    expected = inner(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), expected)


def test_starts_as_the_mean_over_the_window():
    layer = build_conv_layer(dict(type='DCNv4', without_pointwise=True), 16, 16, 3, padding=1)
    x = torch.randn(2, 16, 6, 9)
    torch.testing.assert_close(layer(x), nn.functional.avg_pool2d(x, 3, 1, 1))
    layer.init_weights()
    torch.testing.assert_close(layer(x), nn.functional.avg_pool2d(x, 3, 1, 1))


def test_bias_without_projections():
    layer = DCNv4Conv2d(16, 16, 3, padding=1, without_pointwise=True)
    plain = DCNv4Conv2d(16, 16, 3, padding=1, without_pointwise=True, bias=False)
    assert plain.output_bias is None
    assert set(layer.state_dict()) - set(plain.state_dict()) == {'output_bias'}
    bias = torch.randn(16)
    layer.output_bias.data.copy_(bias)
    x = torch.randn(1, 16, 4, 5)
    torch.testing.assert_close(layer(x), plain(x) + bias[:, None, None])
    layer.init_weights()
    assert not layer.output_bias.any()


def test_width_of_the_value():
    """The change of width before the operator or after it: the same sums in another order."""
    arguments = dict(padding=1, bias=False, group=2)
    wide = DCNv4Conv2d(8, 24, 3, **arguments)
    narrow = DCNv4Conv2d(8, 24, 3, **arguments, value_channels=8)
    assert [layer.value_proj.weight.shape for layer in (wide, narrow)] == [(24, 8), (8, 8)]
    assert [layer.output_proj.weight.shape for layer in (wide, narrow)] == [(24, 24), (24, 8)]
    randomise(narrow)
    x = torch.randn(2, 8, 5, 6)
    inner = DCNv4Conv2d(8, 8, 3, padding=1, group=2)
    inner.load_state_dict({**narrow.state_dict(), 'output_proj.weight': torch.eye(8),
                           'output_proj.bias': torch.zeros(8)})
    expected = nn.functional.conv2d(inner(x), narrow.output_proj.weight[:, :, None, None])
    torch.testing.assert_close(narrow(x), expected)
    assert narrow(x).shape == (2, 24, 5, 6)


@pytest.mark.parametrize('mask_init, learns', [(None, True), (0.0, False)])
def test_start_value_decides_whether_a_layer_before_a_relu_learns(mask_init, learns):
    module = ConvModule(16, 16, 3, padding=1, norm_cfg=dict(type='BN'),
                        conv_cfg=dict(type='DCNv4', mask_init=mask_init))
    module(torch.randn(2, 16, 8, 8)).square().sum().backward()
    assert bool(module.conv.offset_mask.weight.grad.any()) == learns
    assert bool(module.conv.value_proj.weight.grad.any()) == learns


@pytest.mark.parametrize('channels, group', [
    (64, 4), (80, 5), (112, 7), (96, 6), (72, 4), (16, 1), (24, 1), (8, 1), (17, 1), (34, 2),
    (2048, 128)])
def test_default_group(channels, group):
    assert default_group(channels) == group
    layer = DCNv4Conv2d(8, channels, 1)
    assert layer.geometry.groups == group


@pytest.mark.parametrize('options, error, words', [
    (dict(groups=2), ValueError, ('groups=2', '`group`', 'ResNeXt')),
    (dict(group=3), ValueError, ('group', '16', '3')),
    (dict(group=0), ValueError, ('DCNv4: group must be >= 1, got 0',)),
    (dict(kernel_size=0), ValueError, ('kernel_size', '0')),
    (dict(without_pointwise=True), ValueError, ('in_channels', '8')),
    (dict(deform_groups=1), TypeError, ('deform_groups=1', '`group`', '_delete_=True')),
    (dict(deformable=1), TypeError, ('deformable',)),
    (dict(dw_kernel_size=2), ValueError, ('dw_kernel_size', '2'))])
def test_bad_arguments(options, error, words):
    arguments = dict(dict(in_channels=8, out_channels=16, kernel_size=3), **options)
    with pytest.raises(error) as caught:
        DCNv4Conv2d(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_bad_input():
    with pytest.raises(ValueError, match=r'\(N, 8, H, W\)'):
        DCNv4Conv2d(8, 16, 3)(torch.zeros(1, 7, 5, 5))


@pytest.mark.parametrize('act', [dict(type='ReLU'), None])
def test_in_a_conv_module(act):
    module = ConvModule(8, 16, 3, stride=2, padding=1, conv_cfg=dict(type='DCNv4', group=4),
                        norm_cfg=dict(type='BN'), act_cfg=act)
    assert module.conv.output_proj.bias is None  # mmcv: no bias before a norm
    # mmcv's own initialisation has not touched the layer
    assert not module.conv.offset_mask.weight.any()
    out = module(torch.randn(2, 8, 9, 12))
    assert out.shape == (2, 16, 5, 6) and out.std() > 0.1


def test_in_the_resnet_of_mmdet():
    ResNet = pytest.importorskip('mmdet.models.backbones').ResNet
    torch.manual_seed(0)
    model = ResNet(50, dcn=dict(type='DCNv4', fallback_on_stride=False),
                   stage_with_dcn=(False, True, True, True))
    model.init_weights()
    layers = [module for module in model.modules() if isinstance(module, DCNv4Conv2d)]
    assert len(layers) == 4 + 6 + 3
    assert [layer.stride for layer in layers].count((2, 2)) == 3
    assert all(not layer.offset_mask.weight.any() for layer in layers)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = torch.randn(2, 3, 64, 96)
    # two steps: mmdet starts the last norm of each bottleneck at zero, so that nothing inside a
    # bottleneck has a gradient in the first one
    for _ in range(2):
        outs = model(images)
        optimizer.zero_grad()
        sum(out.square().mean() for out in outs).backward()
        optimizer.step()
    assert [out.shape[2:] for out in outs] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert all(out.is_contiguous() for out in outs)
    for layer in layers:
        assert layer.value_proj.weight.grad.any() and layer.output_proj.weight.grad.any()
        rows = layer.offset_mask.weight.grad[:27].abs().sum(1)  # of the first group
        assert rows[:18].sum() > 0 and rows[18:].sum() > 0  # offsets, masks


@pytest.mark.parametrize('library, name, count', [
    ('mmdet', 'ResNet', 3), ('mmdet', 'Res2Net', 9), ('mmseg', 'ResNetV1c', 3),
    ('mmdet', 'ResNeXt', None), ('mmdet', 'RegNet', None), ('mmdet', 'ResNeSt', None)])
def test_hosts_of_the_docs(library, name, count):
    """Layers in the last stage of a host; None where its convolutions are grouped."""
    host = getattr(pytest.importorskip(f'{library}.models.backbones'), name)
    options = dict(arch='regnetx_400mf') if name == 'RegNet' else dict(depth=50)
    if name == 'ResNeXt':
        options['groups'] = 32
    options.update(dcn=dict(type='DCNv4', fallback_on_stride=False),
                   stage_with_dcn=(False, False, False, True))
    if count is None:
        with pytest.raises(ValueError, match='grouped convolution'):
            host(**options)
        return
    model = host(**options)
    assert sum(isinstance(module, DCNv4Conv2d) for module in model.modules()) == count


def test_norm_is_over_channels_of_each_pixel():
    name, norm = build_norm_layer(dict(type='ChannelLN'), 6)
    assert name == 'ln' and norm.eps == 1e-5
    randomise(norm)
    x = 3 + 2 * torch.randn(2, 6, 5, 7)
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
    expected = ((x - mean) / (var + 1e-5).sqrt() * norm.weight[:, None, None]
                + norm.bias[:, None, None])
    for order in (torch.contiguous_format, torch.channels_last):
        out = norm(x.contiguous(memory_format=order))
        torch.testing.assert_close(out, expected)
        assert out.is_contiguous()


def test_norm_refuses_other_shapes():
    _, norm = build_norm_layer(dict(type='ChannelLN', eps=1e-6), 6)
    assert norm.eps == 1e-6
    with pytest.raises(ValueError, match=r'\(N, 6, H, W\)'):
        norm(torch.zeros(2, 5, 6, 6))


@pytest.mark.parametrize('channels, count', [(64, 2_609_152), (80, 2_670_592), (112, 2_793_472)])
def test_fpn_with_layer_norm(channels, count):
    FPN = pytest.importorskip('mmdet.models.necks').FPN
    widths = [channels * 2**i for i in range(4)]
    neck = FPN(in_channels=widths, out_channels=256, num_outs=5, norm_cfg=dict(type='ChannelLN'))
    assert sum(p.numel() for p in neck.parameters()) == count
    assert set(neck.state_dict()) == {
        f'{part}_convs.{i}.{key}' for part in ('lateral', 'fpn') for i in range(4)
        for key in ('conv.weight', 'ln.weight', 'ln.bias')}
    neck.init_weights()
    for conv in (neck.lateral_convs[0].conv, neck.fpn_convs[3].conv):
        fan = (conv.in_channels + conv.out_channels) * conv.kernel_size[0]**2
        bound = (6 / fan)**0.5  # Xavier uniform
        assert 0.95 * bound < conv.weight.abs().max() <= bound
    outs = neck([torch.randn(2, width, 17 - 4 * i, 12 - 2 * i)
                 for i, width in enumerate(widths)])
    assert [out.shape[2:] for out in outs] == [(17, 12), (13, 10), (9, 8), (5, 6), (3, 3)]
    assert all(out.is_contiguous() for out in outs)
    # the last operation of the first four levels is the norm
    torch.testing.assert_close(outs[0].mean(1), torch.zeros(2, 17, 12), rtol=0, atol=1e-5)
