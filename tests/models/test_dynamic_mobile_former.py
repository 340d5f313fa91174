# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Dynamic Mobile-Former: sizes, dynamic convolutions against loops, GRN, statistics, weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from mmdcnv4.models.backbones import DynamicMobileFormer
from mmdcnv4.models.layers.dynamic_conv import DynamicConv2d
from mmdcnv4.models.layers.mobile_former import (
    GlobalResponseNorm,
    LightCrossAttention,
    TokenAttention,
)

TINY = dict(stem_channels=(8, 12, 8), groups=2, num_tokens=3, token_channels=32, num_kernels=3,
            stages=(((16, 12, 2),), ((20, 16, 2),), ((32, 20, 4),), ((40, 24, 4),)),
            drop_path_rate=0.0)
BLOCKS = dict(
    s=(525_276, 523_812, 640_058, 656_258, 945_525, 1_114_949, 1_546_271, 2_020_031, 2_320_680,
       3_102_312, 3_102_312),
    xs=(493_956, 492_858, 573_420, 585_570, 782_052, 909_120, 1_205_952, 1_561_272, 1_738_344,
        2_324_568, 2_324_568),
    xxs=(467_100, 466_368, 520_284, 528_384, 659_736, 744_448, 942_648, 1_179_528, 1_297_992,
         1_688_808, 1_688_808))


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize('arch, start, channel_conv, end, norm, widths', [
    ('s', 4_848, 3_195_264, 388_416, 2_880, [40, 72, 176, 240]),
    ('xs', 3_172, 1_939_584, 365_376, 2_304, [30, 54, 132, 180]),
    ('xxs', 2_424, 1_098_624, 342_336, 1_920, [20, 36, 88, 120])])
def test_parameters(arch, start, channel_conv, end, norm, widths):
    with torch.device('meta'):
        model = DynamicMobileFormer(arch, class_features=True)
        plain = DynamicMobileFormer(arch)
    assert tuple(map(parameters, model.blocks)) == BLOCKS[arch]
    assert parameters(plain) == start + sum(BLOCKS[arch])
    assert parameters(model.channel_conv) == channel_conv and parameters(model.bn) == norm
    assert parameters(model.end_mobile2former) + parameters(model.end_former) == end
    outs = plain.eval()(torch.empty(2, 3, 65, 224, device='meta'))
    assert [tuple(out.shape) for out in outs] == [
        (2, width, -(-65 // 2**(i + 2)), 224 // 2**(i + 2)) for i, width in enumerate(widths)]


def dynamic_conv(kernel_size, groups, dtype=torch.float64):
    torch.manual_seed(1)
    conv = DynamicConv2d(6, 12 if kernel_size == 1 else 6, kernel_size, groups, token_channels=5,
                         num_kernels=3, norm_cfg=dict(type='BN')).to(dtype).eval()
    with torch.no_grad():
        conv.weight.normal_()
        conv.Kernel_Attention.bn.running_mean.normal_()
    return conv


def convolve_by_hand(conv, x, token):
    """Sample by sample, kernel by kernel, pixel by pixel."""
    attention, outs = conv.Kernel_Attention, []
    net1, net2 = attention.net1.weight[..., 0, 0], attention.net2.weight[..., 0, 0]
    for sample, vector in zip(x, token):
        a = net1 @ torch.cat([vector, sample.mean((1, 2))])
        bn = attention.bn
        a = ((a - bn.running_mean) / (bn.running_var + bn.eps).sqrt() * bn.weight + bn.bias)
        pi = 1 / (1 + torch.exp(-(net2 @ a.clamp(min=0)) / attention.temperature))
        kernel = conv.static_weight.clone()
        for k, weight in enumerate(conv.weight):
            kernel = kernel + 0.1 * pi[k] * weight
        reach = conv.kernel_size // 2
        padded = F.pad(sample, [reach] * 4)
        per_in, per_out = kernel.shape[1], len(kernel) // conv.groups
        out = torch.zeros(len(kernel), *sample.shape[1:], dtype=x.dtype)
        for o in range(len(kernel)):
            first = o // per_out * per_in
            for y in range(sample.shape[1]):
                for z in range(sample.shape[2]):
                    window = padded[first:first + per_in, y:y + conv.kernel_size,
                                    z:z + conv.kernel_size]
                    out[o, y, z] = (window * kernel[o]).sum()
        outs.append(out)
    return torch.stack(outs)


CONVS = [(1, 1), (1, 3), (3, 6), (3, 2)]


@pytest.mark.parametrize('kernel_size, groups', CONVS)
@pytest.mark.parametrize('temperature', [1.0, 30.0])
def test_dynamic_convolution_against_a_loop(kernel_size, groups, temperature):
    conv = dynamic_conv(kernel_size, groups)
    conv.set_temperature(temperature)
    x, token = torch.randn(3, 6, 4, 5).double(), torch.randn(3, 5).double()
    torch.testing.assert_close(conv(x, token), convolve_by_hand(conv, x, token))


@pytest.mark.parametrize('kernel_size, groups', CONVS)
def test_gradients(kernel_size, groups):
    conv = dynamic_conv(kernel_size, groups)
    x, token = torch.randn(2, 6, 3, 2).double(), torch.randn(2, 5).double()
    names = ['static_weight', 'weight', 'Kernel_Attention.net1.weight',
             'Kernel_Attention.net2.weight']
    state = dict(conv.named_parameters())

    def run(x, token, *weights):
        return torch.func.functional_call(conv, dict(zip(names, weights)), (x, token))

    inputs = [tensor.detach().requires_grad_() for tensor in (
        x, token, *(state[name] for name in names))]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize('kernel_size, groups', CONVS)
def test_starts_as_a_static_convolution(kernel_size, groups):
    conv = dynamic_conv(kernel_size, groups)
    conv.reset_parameters()
    x = torch.randn(3, 6, 4, 5).double()
    torch.testing.assert_close(conv(x, torch.randn(3, 5).double()), F.conv2d(
        x, conv.static_weight, padding=kernel_size // 2, groups=groups))


def test_grn_by_channel_and_as_released():
    x = torch.randn(2, 3, 4, 5).double()
    for mode in ('channel', 'legacy'):
        layer = GlobalResponseNorm(3, mode).double()
        with torch.no_grad():
            layer.gamma.normal_()
            layer.beta.normal_()
        norms = (x**2).sum((2, 3)).sqrt()
        for n in range(2):
            for c in range(3):
                mean = norms[n].sum() / 3 if mode == 'channel' else norms[n, c]
                expected = (layer.gamma[0, c] * x[n, c] * norms[n, c] / (mean + 1e-6)
                            + layer.beta[0, c] + x[n, c])
                torch.testing.assert_close(layer(x)[n, c], expected)
        assert torch.autograd.gradcheck(layer, [x.clone().requires_grad_()])


def test_cross_attention_by_hand():
    layer = LightCrossAttention(6, 8, 2, 0.0).double()
    torch.nn.init.normal_(layer.norm.weight)
    x, tokens = torch.randn(2, 6, 3, 4).double(), torch.randn(2, 5, 8).double()
    out = layer(x, tokens)
    for n in range(2):
        for t in range(5):
            normed = F.layer_norm(tokens[n, t], (8,), layer.norm.weight, layer.norm.bias)
            query, read = layer.q.weight @ normed, []
            for head in range(2):
                part = slice(3 * head, 3 * head + 3)
                pixels = x[n, part].flatten(1).t()
                weights = torch.softmax(pixels @ query[part] / math.sqrt(3), 0)
                read.append(weights @ pixels)
            torch.testing.assert_close(out[n, t], normed + layer.fc.weight @ torch.cat(read))


def test_token_attention_by_hand():
    layer = TokenAttention(6, 2).double()
    tokens = torch.randn(1, 4, 6).double()
    query, key, value = (tokens[0] @ layer.qkv.weight.t()).split(6, dim=1)
    parts = []
    for head in range(2):
        part = slice(3 * head, 3 * head + 3)
        weights = torch.softmax(query[:, part] @ key[:, part].t() / math.sqrt(3), 1)
        parts.append(weights @ value[:, part])
    torch.testing.assert_close(layer(tokens)[0], layer.proj(torch.cat(parts, 1)))


@pytest.mark.parametrize('frozen_stages', [-1, 2])
def test_recomputation_counts_a_batch_once(frozen_stages):
    states = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        model = DynamicMobileFormer(**TINY, with_cp=with_cp, frozen_stages=frozen_stages).train()
        torch.manual_seed(1)
        sum(out.sum() for out in model(torch.randn(2, 3, 64, 64))).backward()
        states.append(dict(model.named_buffers()))
    assert states[0]['blocks.3.ffn.bn1.num_batches_tracked'] == 1
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, msg=name)


def test_norm_eval_and_a_batch_of_one():
    image = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match='training batch must have at least 2 images.*norm_eval'):
        DynamicMobileFormer(**TINY).train()(image)
    model = DynamicMobileFormer(**TINY, norm_eval=True).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model(image)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert model.blocks[0].ffn.training and not model.blocks[0].ffn.bn1.training
    DynamicMobileFormer(**TINY, norm_cfg=dict(type='GN', num_groups=2)).train()(image)


def test_temperature_reaches_every_convolution():
    model = DynamicMobileFormer(**TINY, class_features=True)
    model.set_temperature(7.0)
    convs = [module for module in model.modules() if isinstance(module, DynamicConv2d)]
    assert len(convs) == 3 * 4 + 1
    assert {conv.Kernel_Attention.temperature.item() for conv in convs} == {7.0}
    assert not [key for key in model.state_dict() if 'temperature' in key]
    for value in (0, -1.0, True, float('inf'), '3'):
        with pytest.raises(ValueError, match='temperature must be a number > 0'):
            model.set_temperature(value)


def test_a_classifier_serves_as_weights(tmp_path):
    classifier = DynamicMobileFormer(**TINY, class_features=True, end_channels=48)
    weights = {f'backbone.{key}': value for key, value in classifier.state_dict().items()}
    weights['head.layers.0.fc.weight'] = torch.zeros(2, 80)
    torch.save(dict(state_dict=weights), tmp_path / 'a.pth')
    model = DynamicMobileFormer(**TINY, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'a.pth')))
    model.init_weights()
    for key, value in model.state_dict().items():
        assert torch.equal(value, classifier.state_dict()[key])
    model = DynamicMobileFormer(**TINY, init_cfg=dict(type='Pretrained', checkpoint='absent.pth'))
    with pytest.raises(FileNotFoundError, match='No weights of Dynamic Mobile-Former'):
        model.init_weights()


@pytest.mark.parametrize('options, text', [
    (dict(arch='m'), 'arch must be'), (dict(stages=None), 'stages must be given'),
    (dict(stages=((), (), (), ())), 'stages must be four'), (dict(groups=3), r'stem_channels\[2\]'),
    (dict(stem_channels=(8, 8)), 'stem_channels must be three'),
    (dict(stages=(((16, 12, 3),),) * 4), r'stages\[0\]\[0\] must be heads'),
    (dict(grn_mode='none'), 'grn_mode'), (dict(former_heads=3), 'former_heads must be a divisor'),
    (dict(num_kernels=0), 'num_kernels'), (dict(out_indices=()), 'out_indices'),
    (dict(ffn_ratio=0), 'ffn_ratio'), (dict(norm_eval=1), 'norm_eval')])
def test_bad_sizes_are_named(options, text):
    with pytest.raises(ValueError, match=f'DynamicMobileFormer: {text}'):
        DynamicMobileFormer(**{**TINY, **options})
