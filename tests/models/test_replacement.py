# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""`replace_with_dcnv4`: what it replaces, what it leaves and why, and how the new layers start."""

from __future__ import annotations

import copy
import re
from collections import OrderedDict

import pytest
import torch
from mmcv.cnn import ConvModule
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn.utils import parametrizations

import mmdcnv4  # noqa: F401  registers
from mmdcnv4.models.layers.dcnv4_attention import DCNv4Attention
from mmdcnv4.models.layers.dcnv4_conv import DCNv4Conv2d
from mmdcnv4.models.replacement import replace_with_dcnv4, with_dcnv4
from mmdcnv4.ops import DCNv4


class Grouped(nn.Conv2d):
    """A convolution that computes something else."""

    def forward(self, x):
        return super().forward(x) * 2


class Network(nn.Module):
    """Layers of all kinds in the containers of torch and mmcv."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.body = nn.Sequential(OrderedDict(
            widen=nn.Conv2d(16, 32, 3, padding=1), act=nn.ReLU(),
            same=nn.Conv2d(32, 32, 3, 2, 1, bias=False)))
        self.mix = nn.ModuleList([nn.Conv2d(32, 32, 7, padding=3, groups=32),
                                  nn.Conv2d(32, 32, 1)])
        self.block = ConvModule(32, 32, 3, padding=2, dilation=2, norm_cfg=dict(type='BN'))

    def forward(self, x):
        x = self.body(self.stem(x))
        for layer in self.mix:
            x = layer(x)
        return self.block(x)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def host(**layers):
    return nn.ModuleDict(layers)


def dcnv4_parameters(width, out, group_width, points=9, bias=True):
    """Two projections and the predictor."""
    predictor = -(-3 * points * (width // group_width) // 8) * 8
    return width * (width + 1) + predictor * (width + 1) + out * (width + bias)


def test_replaces_by_kind_and_keeps_the_shapes():
    torch.manual_seed(0)
    model = Network()
    x = torch.randn(2, 3, 33, 46)
    before, count, names = model(x), parameters(model), set(dict(model.named_modules()))
    report = replace_with_dcnv4(model, match='*', cfg=dict(dw_kernel_size=None))
    assert model(x).shape == before.shape
    assert [entry.name for entry in report.replaced] == [
        'body.widen', 'body.same', 'mix.0', 'block.conv']
    assert [(entry.name, entry.note) for entry in report.skipped] == [
        ('stem', 'width 3: no divisor up to 16 is a multiple of 8; choose group_channels among its '
                 'divisors'), ('mix.1', '1x1: nothing to sample')]
    layers = {name: module for name, module in model.named_modules()
              if isinstance(module, DCNv4Conv2d)}
    assert list(layers) == [entry.name for entry in report.replaced]
    assert set(dict(model.named_modules())) >= names
    for entry in report.replaced:
        assert entry.new == parameters(layers[entry.name])
        assert entry.groups == layers[entry.name].geometry.groups
    assert (report.total, report.new_total) == (count, parameters(model))
    expected = [dcnv4_parameters(16, 32, 16), dcnv4_parameters(32, 32, 16, bias=False),
                -(-3 * 49 * 2 // 8) * 8 * 33 + 32, dcnv4_parameters(32, 32, 16, bias=False)]
    assert [entry.new for entry in report.replaced] == expected
    assert layers['body.same'].stride == (2, 2) and layers['mix.0'].value_proj is None
    assert model.block.groups == 1 and model.block.dilation == (2, 2)
    model(x).square().mean().backward()
    assert all(layer.offset_mask.weight.grad.any() for layer in layers.values())


def test_a_second_time_nothing_is_left():
    model = Network()
    replace_with_dcnv4(model, match='*')
    once = copy.deepcopy(model.state_dict())
    report = replace_with_dcnv4(model, match='body*', allow_none=True)
    assert not report.replaced and {entry.note for entry in report.skipped} == {
        'is DCNv4 already'}
    assert once.keys() == model.state_dict().keys()
    # not the depthwise convolution inside a DCNv4 layer, either
    model = Network()
    replace_with_dcnv4(model, match='body*', cfg=dict(dw_kernel_size=3))
    report = replace_with_dcnv4(model, match='body*', allow_none=True)
    assert [entry.name for entry in report.skipped] == ['body.widen', 'body.same']


def test_dry_run_changes_nothing():
    model = Network()
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    report = replace_with_dcnv4(model, match='*', dry_run=True, init_from='conv')
    assert len(report.replaced) == 4
    assert all(one is other for one, other in zip(modules, model.modules()))
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert str(replace_with_dcnv4(model, match='*', init_from='conv')) == str(report)


def test_the_table():
    model = Network()
    lines = str(replace_with_dcnv4(model, match='*', cfg=dict(kernel_size=3))).splitlines()
    total = parameters(model)
    assert lines[0].startswith('DCNv4 replaces 4 layers, 2 that match are left;')
    assert f'-> {total:,}' in lines[0] and len(lines) == 2 + 6
    row = next(line for line in lines if line.startswith('mix.0'))
    assert re.split(r'\s{2,}', row) == ['mix.0', 'depthwise', '1,600', '1,880', '2', '7x7 to 3x3']


@pytest.mark.parametrize('match', [
    'body.*', ['body.w*', 'body.same'], re.compile(r'^body\.'), r're:^body\.',
    lambda name, module: name.startswith('body') and isinstance(module, nn.Conv2d)])
def test_ways_to_match(match):
    report = replace_with_dcnv4(Network(), match=match)
    assert [entry.name for entry in report.replaced] == ['body.widen', 'body.same']
    assert not report.skipped


REASONS = {
    'transposed convolution': lambda: nn.ConvTranspose2d(16, 16, 3),
    '1-D convolution': lambda: nn.Conv1d(16, 16, 3),
    'grouped convolution of 2 groups': lambda: nn.Conv2d(16, 16, 3, groups=2),
    'regular convolution of 5x5, not 3x3': lambda: nn.Conv2d(16, 16, 5),
    '1x1: nothing to sample': lambda: nn.Conv2d(16, 16, 1),
    'kernel 2x2 has an even side': lambda: nn.Conv2d(16, 16, 2),
    "padding_mode 'reflect'": lambda: nn.Conv2d(16, 16, 3, padding=1, padding_mode='reflect'),
    'Grouped computes more than a convolution': lambda: Grouped(16, 16, 3),
    'has hooks or a parametrisation': lambda: parametrizations.weight_norm(nn.Conv2d(16, 16, 3)),
    'width 12: no divisor up to 16': lambda: nn.Conv2d(12, 12, 3),
    'is DCNv4 already': lambda: DCNv4Conv2d(16, 16, 3),
    'depthwise is not among the targets': lambda: nn.Conv2d(16, 16, 3, groups=16),
    'is quantised': lambda: with_qconfig(nn.Conv2d(16, 16, 3)),
}


def with_qconfig(layer):
    """As torch prepares a layer for quantisation."""
    layer.qconfig = object()
    return layer


@pytest.mark.parametrize('reason', REASONS)
def test_every_reason_is_told(reason):
    layer = REASONS[reason]()
    model = host(layer=layer, other=nn.Conv2d(16, 16, 3))
    report = replace_with_dcnv4(model, match='*', targets=('conv3x3',))
    assert [entry.name for entry in report.replaced] == ['other']
    (entry,) = report.skipped
    assert entry.name == 'layer' and entry.note.startswith(reason)
    assert model['layer'] is layer and entry.new == entry.old == parameters(layer)


def test_a_shape_that_would_change():
    model = host(a=nn.Conv2d(16, 16, 7, groups=16), b=nn.Conv2d(16, 16, 7, padding=3, groups=16),
                 c=nn.Conv2d(16, 16, 5, padding='same', dilation=2, groups=16))
    x = torch.randn(1, 16, 15, 16)
    before = {name: layer(x).shape for name, layer in model.items()}
    report = replace_with_dcnv4(model, match='*', cfg=dict(kernel_size=3))
    (entry,) = report.skipped
    assert entry.name == 'a' and entry.note.startswith('its shape would change')
    assert {name: layer(x).shape for name, layer in model.items()} == before
    # with its own kernel the unpadded one keeps its shape
    replace_with_dcnv4(model, match='a')
    assert model['a'](x).shape == before['a']


def test_shared_modules():
    conv = nn.Conv2d(16, 16, 3, padding=1)
    model = host(a=host(conv=conv), b=host(conv=conv), c=host(conv=nn.Conv2d(16, 16, 3)))
    report = replace_with_dcnv4(model, match='a.*', allow_none=True)
    assert not report.replaced
    assert report.skipped[0].note == 'is also b.conv, which does not match'
    report = replace_with_dcnv4(model, match='[ab].*')
    assert [(entry.name, entry.note) for entry in report.replaced] == [
        ('a.conv', 'shared: also b.conv')]
    assert model['a']['conv'] is model['b']['conv'] is not conv
    tied = host(a=nn.Conv2d(16, 16, 3), b=nn.Conv2d(16, 16, 3))
    tied['b'].weight = tied['a'].weight
    report = replace_with_dcnv4(tied, match='*', allow_none=True)
    assert [entry.note for entry in report.skipped] == ['shares its weights with another layer'] * 2


@pytest.mark.parametrize('options, text', [
    (dict(match='layer9*'), 'layer9.*the name of no convolution; there are 6: stem, body.widen'),
    (dict(match='mix.1'), 'mix.1.* none of the kinds .*mix.1: 1x1: nothing to sample'),
    (dict(match=''), 'match must be a glob'), (dict(match=3), 'match must be a glob'),
    (dict(match='*', targets='conv3x3'), 'targets must be some of'),
    (dict(match='*', targets=('conv',)), 'targets must be some of'),
    (dict(match='*', cfg=dict(group=4)), r"cfg must have keys among .*got \['group'\]"),
    (dict(match='*', cfg=dict(group_channels=0)), 'group_channels must be a number >= 1, got 0'),
    (dict(match='*', cfg=dict(kernel_size=4)), 'kernel_size must be an odd number, got 4'),
    (dict(match='*', cfg=dict(value_width=16)), "value_width must be 'in' or 'out', got 16"),
    (dict(match='*', init_from='kernel'), 'init_from must be None or one of')])
def test_wrong_use(options, text):
    model = Network()
    with pytest.raises(ValueError, match=text):
        replace_with_dcnv4(model, **options)
    assert not any(isinstance(module, DCNv4) for module in model.modules())


@pytest.mark.parametrize('kind', ['dtype', 'device', 'frozen', 'eval'])
def test_what_the_new_layer_inherits(kind):
    model = host(conv=nn.Conv2d(16, 16, 3, padding=1))
    if kind == 'dtype':
        model.double()
    elif kind == 'device':
        model.to('meta')
    elif kind == 'frozen':
        model.requires_grad_(False)
    else:
        model.eval()
    replace_with_dcnv4(model, match='conv', init_from='conv')
    layer = model['conv']
    assert isinstance(layer, DCNv4Conv2d) and layer.training == (kind != 'eval')
    for parameter in layer.parameters():
        assert parameter.dtype == (torch.double if kind == 'dtype' else torch.float)
        assert parameter.device.type == ('meta' if kind == 'device' else 'cpu')
        assert parameter.requires_grad == (kind != 'frozen')


@pytest.mark.parametrize('group_channels, width', [(32, 24), (24, 24), (16, 8), (4, 4)])
def test_groups_of_widths_that_do_not_divide(group_channels, width):
    model = host(conv=nn.Conv2d(24 if group_channels != 16 else 40, 16, 3))
    (entry,) = replace_with_dcnv4(model, match='*',
                                  cfg=dict(group_channels=group_channels)).replaced
    assert model['conv'].channels // entry.groups == width
    assert entry.note == ('' if width == group_channels else f'{width} channels per group')


@pytest.mark.parametrize('kernel, stride, dilation, pointwise', [
    ((3, 3), 1, 1, False), ((5, 3), 2, 2, False), ((3, 3), 1, 1, True), ((7, 7), 1, 1, False)])
def test_depthwise_kernels_that_are_equal_in_a_group_are_kept(kernel, stride, dilation, pointwise):
    torch.manual_seed(0)
    conv = nn.Conv2d(32, 32, kernel, stride, (2, 1), dilation, groups=32)
    with torch.no_grad():
        conv.weight.copy_(torch.randn(2, 1, *kernel).repeat_interleave(16, 0))
    x = torch.randn(2, 32, 19, 22)
    expected = conv(x)
    model = host(conv=conv)
    (entry,) = replace_with_dcnv4(model, match='*', init_from='conv',
                                  cfg=dict(with_pointwise=pointwise)).replaced
    assert 'start keeps 100 % of the kernel' in entry.note
    torch.testing.assert_close(model['conv'](x), expected, rtol=1e-5, atol=1e-5)


def test_any_depthwise_kernel_is_kept_by_groups_of_one():
    conv = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    x = torch.randn(2, 6, 7, 8)
    model = host(conv=conv)
    replace_with_dcnv4(model, match='*', init_from='conv', cfg=dict(group_channels=1))
    torch.testing.assert_close(model['conv'](x), conv(x), rtol=1e-5, atol=1e-6)


def test_depthwise_kernels_that_differ_become_their_mean():
    conv = nn.Conv2d(32, 32, 3, padding=1, groups=32)
    x = torch.randn(2, 32, 7, 8)
    model = host(conv=conv)
    (entry,) = replace_with_dcnv4(model, match='*', init_from='conv').replaced
    mean = conv.weight.detach().unflatten(0, (2, 16)).mean(1).repeat_interleave(16, 0)
    expected = nn.functional.conv2d(x, mean, conv.bias, padding=1, groups=32)
    torch.testing.assert_close(model['conv'](x), expected, rtol=1e-5, atol=1e-6)
    kept = mean.square().sum() / conv.weight.square().sum()
    assert entry.note == f'start keeps {100 * kept:.0f} % of the kernel'


@pytest.mark.parametrize('inner, outer', [(32, 32), (32, 48), (32, 16)])
@pytest.mark.parametrize('init_from', ['conv', 'center'])
def test_regular_kernels_that_can_be_represented_are_kept(init_from, inner, outer):
    """In each group a pattern of taps times a matrix; for 'center' the middle tap alone."""
    torch.manual_seed(1)
    conv = nn.Conv2d(inner, outer, 3, 2, 1)
    matrix, patterns = torch.randn(outer, 2, inner // 2), torch.randn(2, 3, 3)
    if init_from == 'center':
        patterns = torch.zeros(2, 3, 3)
        patterns[:, 1, 1] = 1.0
    with torch.no_grad():
        conv.weight.copy_(torch.einsum('ogd,gij->ogdij', matrix, patterns).flatten(1, 2))
    x = torch.randn(2, inner, 9, 10)
    model = host(conv=conv)
    (entry,) = replace_with_dcnv4(model, match='*', init_from=init_from).replaced
    assert entry.note == 'stride 2, start keeps 100 % of the kernel'
    torch.testing.assert_close(model['conv'](x), conv(x), rtol=1e-4, atol=1e-4)


def test_a_random_regular_kernel_is_kept_in_part():
    """As much as the best approximation of rank one per group, not less than the middle tap."""
    torch.manual_seed(2)
    conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)
    errors = {}
    x = torch.randn(4, 32, 12, 12)
    for init_from in ('conv', 'center'):
        model = host(conv=copy.deepcopy(conv))
        replace_with_dcnv4(model, match='*', init_from=init_from)
        errors[init_from] = (model['conv'](x) - conv(x)).square().mean() / conv(x).square().mean()
    assert errors['conv'] < errors['center'] < 1


def test_width_of_the_value():
    for value_width, expected in (('in', dcnv4_parameters(64, 16, 16)),
                                  ('out', 64 * 16 + 16 + 32 * 65 + 16 * 17)):
        model = host(conv=nn.Conv2d(64, 16, 3, padding=1))
        (entry,) = replace_with_dcnv4(model, match='*', init_from='center',
                                      cfg=dict(value_width=value_width)).replaced
        assert entry.new == parameters(model) == expected
        assert ('not taken over' in entry.note) == (value_width == 'out')
        assert model['conv'](torch.randn(1, 64, 4, 5)).shape == (1, 16, 4, 5)


def test_a_start_that_is_not_possible_is_told():
    model = host(a=nn.Conv2d(16, 16, 7, padding=3, groups=16), b=nn.Conv2d(16, 16, 3))
    report = replace_with_dcnv4(model, match='*', init_from='conv', cfg=dict(kernel_size=3))
    assert report.replaced[0].note == '7x7 to 3x3, start not taken over: another kernel'
    report = replace_with_dcnv4(host(b=nn.Conv2d(16, 16, 3)), match='*', init_from='conv',
                                cfg=dict(softmax=True))
    assert report.replaced[0].note.startswith('start not taken over: its masks')


class Host(BaseModule):
    """As in mmengine: initialisers by type, then those of the children."""

    def __init__(self, width=16, init_cfg=None, **given):
        super().__init__(init_cfg=init_cfg or dict(type='Constant', layer=['Conv2d', 'Linear'],
                                                   val=0.25))
        self.given = given
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.list = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1)])

    def forward(self, x):
        return self.list[0](self.conv(x))


@pytest.fixture
def registered():
    MODELS.register_module(name='ReplacementHost', module=Host)
    yield
    MODELS._module_dict.pop('ReplacementHost')


@pytest.mark.parametrize('init_from', [None, 'conv'])
def test_factory(registered, init_from, tmp_path):
    weights = Host().state_dict()
    for value in weights.values():
        value.normal_()
    torch.save(weights, tmp_path / 'a.pth')
    cfg = dict(type='with_dcnv4', module=dict(
        type='ReplacementHost', init_cfg=dict(type='Pretrained',
                                              checkpoint=str(tmp_path / 'a.pth'))),
        replace=[dict(match=name, init_from=init_from) for name in ('conv', 'list.0')],
        pretrained='weights')
    outer = BaseModule()
    outer.backbone = MODELS.build(cfg)
    model = outer.backbone
    assert type(model) is Host and model.given == dict(pretrained='weights')
    outer.init_weights()
    for layer in (model.conv, model.list[0]):
        assert not layer.offset_mask.weight.any()
        masks = layer.offset_mask.bias[18:27]
        assert torch.allclose(masks, torch.full((9,), 1 / 9)) == (init_from is None)
    if init_from is not None:  # read before the replacement, and not reset after it
        bias = weights['conv.bias']
        torch.testing.assert_close(model.conv.output_proj.bias, bias)


def test_factory_logs_the_table(registered, capsys):
    MMLogger.get_instance('replacement')
    with_dcnv4(dict(type='ReplacementHost'), dict(match='conv'))
    assert 'Host: DCNv4 replaces 1 layers, 0 that match are left' in capsys.readouterr().out
    with pytest.raises(ValueError, match='replace must be a dict with match'):
        with_dcnv4(dict(type='ReplacementHost'), dict(cfg=dict()))


def test_a_resnet_of_a_config():
    pytest.importorskip('mmdet.models')
    inner = dict(type='ResNet', depth=18, base_channels=16)
    with DefaultScope.overwrite_default_scope('mmdet'), torch.device('meta'):
        plain = MODELS.build(inner)
        model = MODELS.build(dict(type='with_dcnv4', module=inner, replace=dict(
            match='layer[234].*.conv?', cfg=dict(group_channels=16))))
        outs = model(torch.zeros(1, 3, 70, 90))
        expected = plain(torch.zeros(1, 3, 70, 90))
    assert [out.shape for out in outs] == [out.shape for out in expected]
    assert sum(isinstance(module, DCNv4Conv2d) for module in model.modules()) == 12
    # the other keys are those of the ResNet
    assert {key for key in plain.state_dict() if key in model.state_dict()} == {
        key for key in plain.state_dict() if not re.match(r'layer[234].*\.conv\d', key)}


def attention_hosts():
    swin = dict(type='SwinTransformer', embed_dims=32, depths=(2, 1, 1, 1), num_heads=(1, 2, 4, 8),
                drop_path_rate=0.3)
    pvt = dict(type='PyramidVisionTransformer', embed_dims=16, num_layers=[1, 1, 1, 1],
               num_heads=[1, 2, 2, 4], init_cfg=None)
    return dict(swin=(swin, 5), pvt=(pvt, 4))


@pytest.mark.parametrize('name', ['swin', 'pvt'])
def test_attention(name):
    pytest.importorskip('mmdet.models')
    cfg, count = attention_hosts()[name]
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        plain = MODELS.build(cfg)
        model = copy.deepcopy(plain)
        report = replace_with_dcnv4(model, match='*', targets=('attention',))
    assert len(report.replaced) == count
    layers = [module for module in model.modules() if isinstance(module, DCNv4Attention)]
    assert len(layers) == count and all(layer.adds_identity == (name == 'pvt') for layer in layers)
    if name == 'swin':  # the drop path of the attention that was there
        kept = [layer.drop[0].drop_prob for layer in layers]
        assert kept == [module.drop.drop_prob for module in plain.modules()
                        if type(module).__name__ == 'ShiftWindowMSA']
        assert kept[-1] == pytest.approx(0.3)
    images = torch.randn(1, 3, 64, 100)
    model.train()
    outs = model(images)
    assert [out.shape for out in outs] == [out.shape for out in plain(images)]
    model.eval()
    sum(out.square().mean() for out in model(images)).backward()
    assert all(layer.dcn.offset_mask.weight.grad.any() for layer in layers)


def test_attention_against_the_layer():
    torch.manual_seed(0)
    layer = DCNv4Attention(16, nn.Identity(), True, group=2, mask_init=0.3)
    tokens, identity = torch.randn(2, 5 * 6, 16), torch.randn(2, 5 * 6, 16)
    expected = layer.dcn(tokens.view(2, 5, 6, 16)).view(2, 30, 16)
    torch.testing.assert_close(layer(tokens, (5, 6), identity=identity), identity + expected)
    torch.testing.assert_close(layer(tokens, (5, 6)), tokens + expected)
    layer.adds_identity = False
    torch.testing.assert_close(layer(tokens, (5, 6)), expected)
    with pytest.raises(ValueError, match=r'\(N, 5 \* 7, 16\)'):
        layer(tokens, (5, 7))
    with pytest.raises(ValueError, match='kernel_size must be an odd number'):
        DCNv4Attention(16, kernel_size=2)


def test_attention_without_a_map_is_left():
    model = host(a=nn.MultiheadAttention(16, 2))
    with pytest.raises(ValueError, match='not told the size of the map'):
        replace_with_dcnv4(model, match='*', targets=('attention',))
