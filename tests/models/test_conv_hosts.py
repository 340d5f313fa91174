# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Modules of the host libraries with `conv_cfg=dict(type='DCNv4')`.

What looks for `weight` and `bias` of a convolution finds those of the output projection.
"""

from __future__ import annotations

import copy

import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer
from mmcv.cnn.bricks import NonLocal2d
from mmengine.model import constant_init, initialize, kaiming_init, normal_init, xavier_init
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn.utils import prune

import mmdcnv4  # noqa: F401  (registers)
from mmdcnv4.models.layers.dcnv4_conv import DCNv4Conv2d

NAMES = ['value_proj.weight', 'value_proj.bias', 'output_proj.weight', 'output_proj.bias',
         'offset_mask.weight', 'offset_mask.bias']


def conv(**options):
    return build_conv_layer(dict(type='DCNv4', **options), 16, 32 if not options else 16, 3,
                            padding=1)


def pixels():
    return torch.randn(1, 16, 6, 5)


def test_zero_start_of_a_non_local_block_is_the_identity():
    x = torch.randn(1, 32, 6, 6)
    block = NonLocal2d(32, conv_cfg=dict(type='DCNv4'))  # zeros_init=True
    assert torch.equal(block(x), x)
    block(x).square().sum().backward()  # and it leaves the start
    assert block.conv_out.conv.output_proj.weight.grad.any()


def test_initialisers_set_the_output():
    layer, x = conv(), pixels()
    start = copy.deepcopy(layer.state_dict())
    constant_init(layer, 0, bias=3)
    assert torch.equal(layer(x), torch.full((1, 32, 6, 5), 3.0))
    for init in (normal_init, kaiming_init, xavier_init):
        constant_init(layer, 0)
        init(layer)
        assert layer(x).std() > 0.01
    initialize(layer, dict(type='Constant', layer='DCNv4Conv2d', val=0, bias=1))
    assert torch.equal(layer(x), torch.ones(1, 32, 6, 5))
    layer.apply(lambda module: 'Conv' in type(module).__name__ and nn.init.zeros_(module.weight))
    for name, value in layer.state_dict().items():
        assert name.startswith('output_proj') or torch.equal(value, start[name]), name


def test_names_in_the_state_dict_are_those_of_the_layer():
    layer = conv()
    assert list(layer.state_dict()) == [name for name, _ in layer.named_parameters()] == NAMES
    assert build_conv_layer(dict(type='DCNv4'), 16, 16, 3, bias=False).bias is None


def test_batch_norm_in_evaluation_is_folded_into_the_projection(monkeypatch):
    modules = [ConvModule(16, 32, 3, padding=1, conv_cfg=dict(type='DCNv4'),
                          norm_cfg=dict(type='BN'), efficient_conv_bn_eval=fold)
               for fold in (True, False)]
    with torch.no_grad():
        for tensor in (*modules[0].parameters(), *modules[0].buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1.0)
    modules[1].load_state_dict(modules[0].state_dict())
    x = pixels()
    expected = modules[1].eval()(x)
    calls = []
    norm = modules[0].eval().norm
    monkeypatch.setattr(norm, 'forward', lambda *args: calls.append(1) or nn.BatchNorm2d.forward(
        norm, *args))
    torch.testing.assert_close(modules[0](x), expected)
    assert not calls


@pytest.mark.parametrize('change', [
    nn.utils.spectral_norm, nn.utils.weight_norm,
    lambda layer: prune.l1_unstructured(layer, 'weight', 0.5)])
@pytest.mark.filterwarnings('ignore:.*weight_norm:FutureWarning')
def test_what_replaces_a_parameter_is_refused(change):
    with pytest.raises(NotImplementedError, match='DCNv4: the layer has no parameter .weight. of'):
        change(conv())
    layer = conv()
    nn.utils.spectral_norm(layer.output_proj)  # as the message says
    assert layer(pixels()).isfinite().all()


def test_conv_module_with_spectral_norm_is_refused():
    with pytest.raises(NotImplementedError, match='leave out with_spectral_norm'):
        ConvModule(16, 32, 3, conv_cfg=dict(type='DCNv4'), with_spectral_norm=True)


def test_without_projections_the_initialisers_are_refused():
    layer = conv(without_pointwise=True)
    for init in (lambda: constant_init(layer, 0), lambda: normal_init(layer),
                 lambda: kaiming_init(layer), lambda: layer.weight.data):
        with pytest.raises(NotImplementedError, match='without_pointwise=True the layer has no'):
            init()


@pytest.mark.parametrize('options', [{}, dict(without_pointwise=True)])
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
def test_copies_and_traces(options):
    layer, x = conv(**options).eval(), pixels()
    expected = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x), expected)
    assert torch.equal(torch.jit.trace(layer, (x,))(x), expected)
    assert torch.equal(torch.export.export(layer, (x,)).module()(x), expected)


def necks_and_heads():
    dcn = dict(type='DCNv4')
    fpn = dict(in_channels=[16, 32], out_channels=16, num_outs=2)
    head = dict(num_classes=2, in_channels=16, feat_channels=16, stacked_convs=1,
                with_objectness=False, norm_cfg=dict(type='BN'),
                anchor_generator=dict(type='MlvlPointGenerator', offset=0, strides=[8, 16]),
                bbox_coder=dict(type='DistancePointBBoxCoder'),
                loss_cls=dict(type='QualityFocalLoss', use_sigmoid=True),
                loss_bbox=dict(type='GIoULoss'))
    return {'FPN': dict(fpn, type='FPN', conv_cfg=dcn),
            'PAFPN': dict(fpn, type='PAFPN', conv_cfg=dcn),
            'RTMDetHead': dict(head, type='RTMDetHead', conv_cfg=dcn)}


@pytest.mark.parametrize('name', ['FPN', 'PAFPN', 'RTMDetHead'])
def test_conv_cfg_of_necks_and_heads(name):
    pytest.importorskip('mmdet.models')
    cfg = necks_and_heads()[name]
    with DefaultScope.overwrite_default_scope('mmdet'):
        module, plain = (MODELS.build(dict(cfg, conv_cfg=entry))
                         for entry in (cfg['conv_cfg'], None))
    assert sum(isinstance(layer, DCNv4Conv2d) for layer in module.modules()) > 0
    maps = [torch.randn(2, 16, 6, 8), torch.randn(2, 16 if 'Head' in name else 32, 3, 4)]
    outs, expected = (torch.utils._pytree.tree_leaves(layer(maps)) for layer in (module, plain))
    assert [out.shape for out in outs] == [out.shape for out in expected]
    sum(out.square().mean() for out in outs).backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_a_depthwise_conv_of_a_host_is_told_the_other_way():
    """CSPNeXt passes its conv_cfg to depthwise convolutions as well."""
    pytest.importorskip('mmdet.models')
    cfg = dict(type='CSPNeXtPAFPN', in_channels=[16, 32], out_channels=16, num_csp_blocks=1)
    with DefaultScope.overwrite_default_scope('mmdet'):
        with pytest.raises(ValueError, match="depthwise .* write type='with_dcnv4' .* groups=8"):
            MODELS.build(dict(cfg, conv_cfg=dict(type='DCNv4')))
        neck = MODELS.build(dict(type='with_dcnv4', module=cfg,
                                 replace=dict(match='*', targets=['depthwise'])))
    assert sum(isinstance(layer, DCNv4Conv2d) for layer in neck.modules()) == 2
    outs = neck([torch.randn(2, 16, 6, 8), torch.randn(2, 32, 3, 4)])
    assert [tuple(out.shape[1:]) for out in outs] == [(16, 6, 8), (16, 3, 4)]
