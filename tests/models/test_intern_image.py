# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""DCNv3 against its definition, and InternImage against the numbers of its published weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mmdcnv4.models.backbones import FlashInternImage, InternImage
from mmdcnv4.models.layers.dcnv3 import DCNv3
from mmdcnv4.models.layers.intern_image_block import DWConv
from mmdcnv4.ops import DCNv4

TINY = dict(channels=16, depths=(1, 2, 2, 1), groups=(1, 2, 4, 8))
# classifiers; the head is 12C * 8C + 24C + 12C * 1000 + 1000
CLASSIFIERS = dict(t=(64, 29_918_424), s=(80, 50_079_880), b=(112, 97_461_832),
                   l=(160, 223_334_810), xl=(192, 334_819_780))
H = dict(channels=320, depths=(6, 6, 32, 6), groups=(10, 20, 40, 80), dw_kernel_size=5,
         res_post_norm=True, level2_post_norm=True,
         level2_post_norm_block_ids=(5, 11, 17, 23, 29), center_feature_scale=True,
         mlp_fc2_bias=True)  # every published argument


def dcnv3_core(value, offset, mask, kernel, dilation, group, scale, remove_center):
    """The operator of DCNv3 by `grid_sample`, one tap after another.

    value (N, H, W, C), offset (N, H, W, 2KG), mask (N, H, W, KG), already normalised.
    """
    batch, height, width, channels = value.shape
    taps = [(i, j) for i in range(kernel) for j in range(kernel)]  # columns outside
    if remove_center:
        taps.remove((kernel // 2, kernel // 2))
    images = value.view(batch, height, width, group, -1).permute(0, 3, 4, 1, 2).flatten(0, 1)
    offset = offset.view(batch, height, width, group, len(taps), 2)
    mask = mask.view(batch, height, width, group, len(taps))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing='ij')
    total = torch.zeros_like(value)
    for k, (i, j) in enumerate(taps):
        middle = dilation * (kernel - 1) // 2
        x = columns[None, ..., None] + (i * dilation - middle + offset[..., k, 0]) * scale
        y = rows[None, ..., None] + (j * dilation - middle + offset[..., k, 1]) * scale
        grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], -1)
        grid = grid.permute(0, 3, 1, 2, 4).flatten(0, 1)  # (N*G, H, W, 2)
        sample = F.grid_sample(images, grid, 'bilinear', 'zeros', align_corners=False)
        sample = sample.view(batch, group, -1, height, width).permute(0, 3, 4, 1, 2)
        total += (sample * mask[..., k, None]).flatten(3)
    return total


def dcnv3_layer(weights, x, kernel, dilation, group, scale, remove_center):
    """The whole layer, from its state dict."""
    def linear(name, z):
        return F.linear(z, weights[f'{name}.weight'], weights[f'{name}.bias'])

    value = linear('input_proj', x)
    depthwise = weights['dw_conv.0.weight']
    query = F.conv2d(x.permute(0, 3, 1, 2), depthwise, weights['dw_conv.0.bias'],
                     padding=depthwise.shape[-1] // 2, groups=x.shape[-1]).permute(0, 2, 3, 1)
    query = F.layer_norm(query, query.shape[-1:], weights['dw_conv.1.1.weight'],
                         weights['dw_conv.1.1.bias'], 1e-6)
    query = F.gelu(query)
    mask = linear('mask', query).unflatten(-1, (group, -1)).softmax(-1).flatten(-2)
    out = dcnv3_core(value, linear('offset', query), mask, kernel, dilation, group, scale,
                     remove_center)
    if 'center_feature_scale_proj_weight' in weights:
        gate = F.linear(query, weights['center_feature_scale_proj_weight'],
                        weights['center_feature_scale_proj_bias']).sigmoid()
        gate = gate.repeat_interleave(x.shape[-1] // group, -1)
        out = out * (1 - gate) + value * gate
    return linear('output_proj', out)


def shake(module, seed=0):
    """Makes every branch active."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator,
                                           dtype=torch.float64).to(parameter)
    return module


OPTIONS = [
    dict(channels=12, group=3),
    dict(channels=8, group=4, offset_scale=2.0, dilation=2),
    dict(channels=12, group=2, kernel_size=5, dw_kernel_size=3, offset_scale=0.5,
         remove_center=True),
    dict(channels=10, group=5, dw_kernel_size=5, center_feature_scale=True),
]


@pytest.mark.parametrize('options', OPTIONS)
def test_layer_equals_its_definition(options):
    layer = shake(DCNv3(**options).double())
    x = torch.randn(2, 5, 7, options['channels'], dtype=torch.float64, requires_grad=True)
    weights = dict(layer.named_parameters())
    expected = dcnv3_layer(weights, x, options.get('kernel_size', 3), options.get('dilation', 1),
                           options['group'], options.get('offset_scale', 1.0),
                           options.get('remove_center', False))
    actual = layer(x)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    cotangent = torch.randn_like(actual)
    inputs = [x, *weights.values()]
    for ours, theirs in zip(torch.autograd.grad(actual, inputs, cotangent),
                            torch.autograd.grad(expected, inputs, cotangent)):
        torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_layer_names_and_start():
    layer = DCNv3(8, group=2, center_feature_scale=True)
    shapes = {key: tuple(value.shape) for key, value in layer.state_dict().items()}
    assert shapes == {
        'center_feature_scale_proj_weight': (2, 8), 'center_feature_scale_proj_bias': (2,),
        'dw_conv.0.weight': (8, 1, 3, 3), 'dw_conv.0.bias': (8,), 'dw_conv.1.1.weight': (8,),
        'dw_conv.1.1.bias': (8,), 'offset.weight': (36, 8), 'offset.bias': (36,),
        'mask.weight': (18, 8), 'mask.bias': (18,), 'input_proj.weight': (8, 8),
        'input_proj.bias': (8,), 'output_proj.weight': (8, 8), 'output_proj.bias': (8,)}
    layer = DCNv3(8, group=2)
    x = torch.randn(2, 6, 5, 8)
    mean = F.avg_pool2d(layer.input_proj(x).permute(0, 3, 1, 2), 3, 1, 1)  # zeros count
    torch.testing.assert_close(layer(x), layer.output_proj(mean.permute(0, 2, 3, 1)))


@pytest.mark.parametrize('options, name, value', [
    (dict(kernel_size=4), 'kernel_size', '4'), (dict(dw_kernel_size=2), 'dw_kernel_size', '2'),
    (dict(channels=10, group=4), 'group', '4'), (dict(act_layer='Tanh'), 'act_layer', "'Tanh'")])
def test_layer_refuses(options, name, value):
    with pytest.raises(ValueError) as caught:
        DCNv3(**options)
    assert name in str(caught.value) and value in str(caught.value)
    with pytest.raises(ValueError, match=r'\(N, H, W, 64\)'):
        DCNv3()(torch.zeros(1, 64, 4, 4))


@pytest.mark.parametrize('arch', CLASSIFIERS)
def test_published_sizes(arch):
    width, total = CLASSIFIERS[arch]
    with torch.device('meta'):
        model = InternImage(arch)
    head = 12 * width * 8 * width + 24 * width + 12 * width * 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) == total - head
    keys = set(model.state_dict())
    assert {'levels.0.blocks.0.dcn.dw_conv.1.1.weight', 'levels.3.blocks.0.mlp.fc2.bias',
            'levels.1.blocks.0.dcn.output_proj.bias'} <= keys
    assert ('levels.0.blocks.0.gamma1' in keys) == (arch != 't')
    assert ('levels.0.norm.0.weight' in keys) == (arch == 't')
    scale = model.levels[0].blocks[0].dcn.geometry['offset_scale']
    assert scale == (2.0 if arch in ('l', 'xl') else 1.0)  # B too: FlashInternImage-B has 0.5


def test_published_size_of_h():
    with torch.device('meta'):
        model, expected = InternImage('h'), InternImage(**H)
    assert str(model) == str(expected)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in expected.state_dict().items()}
    # the classifier: two 1x1 convolutions, attention pooling with three norms, norm, linear
    head = (2560 * 4096 + 4096) + (1280 * 1024 + 1024) + 3 * (1024 * 1024 + 1024)
    head += 1024 * 768 + 768 + 6 * 1024 + 2 * 768 + 768 * 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) == 1_089_636_760 - head


def test_an_argument_overrides_the_table_of_h():
    with torch.device('meta'):
        model = InternImage('h', res_post_norm=False, center_feature_scale=False,
                            level2_post_norm=False, dw_kernel_size=3)
    assert not any('post_norm' in name or 'center_feature' in name for name in model.state_dict())
    assert model.levels[2].blocks[0].dcn.dw_conv[0].kernel_size == (3, 3)
    with pytest.raises(ValueError, match='level2_post_norm'):
        InternImage('t', level2_post_norm='no')


@pytest.mark.parametrize('options', [
    TINY, dict(TINY, post_norm=True, layer_scale=0.5),
    dict(TINY, res_post_norm=True, center_feature_scale=True, dw_kernel_size=5,
         level2_post_norm=True, level2_post_norm_block_ids=(0,))])
def test_backbone_learns(options):
    model = InternImage(drop_path_rate=0.0, **options)
    model.init_weights()
    outs = model(torch.randn(2, 3, 45, 66))
    assert [tuple(out.shape) for out in outs] == [
        (2, 16, 12, 17), (2, 32, 6, 9), (2, 64, 3, 5), (2, 128, 2, 3)]
    assert all(out.is_contiguous() for out in outs)
    sum(out.square().mean() for out in outs).backward()
    for level in model.levels:
        assert level.blocks[0].dcn.mask.weight.grad.any()
        assert level.blocks[0].dcn.offset.weight.grad.any()


def test_initialisers_by_type_do_not_reach_the_predictors():
    model = InternImage(**TINY, init_cfg=dict(type='Normal', layer='Linear', std=5.0))
    model.init_weights()
    for module in model.modules():
        if isinstance(module, DCNv3):
            assert not module.offset.weight.any() and not module.mask.weight.any()
            assert module.input_proj.weight.abs().max() < 1


@pytest.mark.parametrize('size', [3, 7])
def test_depthwise_layer(size):
    """Against the sum over taps that it stands for; the weights do not depend on the input."""
    layer = DWConv(4, output_bias=False, kernel_size=size).double()
    x = torch.randn(2, 5, 6, 4, dtype=torch.double)
    value = torch.nn.functional.pad(layer.value_proj(x), (0, 0, *[size // 2] * 4))
    expected = layer.conv.bias + sum(
        layer.conv.weight[:, 0, row, column] * value[:, row:row + 5, column:column + 6]
        for row in range(size) for column in range(size))
    torch.testing.assert_close(layer(x), expected @ layer.output_proj.weight.T)
    model = FlashInternImage(**TINY, core_op='DWConv', init_cfg=dict(
        type='Normal', layer='Linear', std=5.0))
    model.init_weights()
    assert model.levels[0].blocks[0].dcn.value_proj.weight.abs().max() < 1


def test_core_op_is_the_only_difference():
    flash = FlashInternImage(**TINY, core_op='DCNv3')
    assert isinstance(flash.levels[0].blocks[0].dcn, DCNv3)
    plain = InternImage(**TINY, core_op='DCNv4')
    assert isinstance(plain.levels[0].blocks[0].dcn, DCNv4)
    fixed = [FlashInternImage(**TINY, core_op=name) for name in ('DWConv', 'DWConv7x7')]
    assert [model.levels[0].blocks[0].dcn.conv.kernel_size for model in fixed] == [(3, 3), (7, 7)]
    windows = FlashInternImage(**TINY, core_op='WindowAttention')
    assert [block.dcn[1].shift for block in windows.levels[2].blocks][:2] == [0, 4]

    def outside(model):
        return {name: value.shape for name, value in model.named_parameters()
                if '.dcn.' not in name}
    for model in (plain, *fixed, windows):
        assert outside(model) == outside(flash)
    with pytest.raises(ValueError, match="arch must be one of .*'xl'"):
        InternImage('g')
    with pytest.raises(TypeError, match='num_classes'):
        InternImage('t', num_classes=3)
