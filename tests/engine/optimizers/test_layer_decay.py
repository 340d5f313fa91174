# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The layer-decay constructor, parameter by parameter, against a table written down by hand."""

from __future__ import annotations

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from torch import nn

import mmdcnv4  # noqa: F401  (registers)
from mmdcnv4.engine.optimizers.layer_decay import layer_id
from mmdcnv4.models.backbones import FlashInternImage

DEPTHS = (1, 2, 3, 1)
N = 7
LR, WD = 0.01, 0.05


class Leaf(BaseModule):
    """Holds parameters under given names."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def make_backbone():
    return FlashInternImage(
        channels=16, depths=DEPTHS, groups=(1, 2, 4, 8), layer_scale=1.0, dw_kernel_size=3,
        level2_post_norm=True, level2_post_norm_block_ids=(0, 2))


def make_model(name='backbone', segmentor=False):
    model = nn.Module()
    model.add_module(name, make_backbone())
    model.neck = nn.Sequential(nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2))
    head = Leaf(weight=(2, 2), bias=(2,), level_embed=(2, 2), relative_position=(2, 2),
                sampling_offsets=(2, 2), reference_points=(2, 2), conv_offset=(2, 2),
                query_embed=(3, 2), query_feat=(3, 2), cls_embed=(3, 2), mask_embed=(3, 2))
    model.add_module('decode_head' if segmentor else 'bbox_head', head)
    return model


def make_groups(model, lr=LR, **paramwise):
    wrapper = build_optim_wrapper(model, dict(
        optimizer=dict(type='AdamW', lr=lr, weight_decay=WD),
        constructor='CustomLayerDecayOptimizerConstructor', paramwise_cfg=paramwise))
    return wrapper.optimizer.param_groups[:]


def by_name(model, groups):
    """Name -> (lr, weight decay); checks that every trainable parameter is there once."""
    names = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    found = {}
    for group in groups:
        for parameter, name in zip(group['params'], group.get('param_names', [])):
            assert names[id(parameter)] == name and name not in found
            found[name] = (group['lr'], group['weight_decay'])
    assert set(found) == set(names.values())
    return found


# Layer of everything in the backbone of `make_backbone`, by the beginning of the name.
BACKBONE_LAYERS = {
    'patch_embed.': 0,
    'levels.0.blocks.0.': 1, 'levels.0.norm.': 2, 'levels.0.downsample.': 2,
    'levels.1.blocks.0.': 2, 'levels.1.blocks.1.': 3, 'levels.1.norm.': 4,
    'levels.1.downsample.': 4,
    'levels.2.blocks.0.': 4, 'levels.2.blocks.1.': 5, 'levels.2.blocks.2.': 6,
    'levels.2.post_norms.0.': 4, 'levels.2.post_norms.1.': 5,
    'levels.2.norm.': 7, 'levels.2.downsample.': 7,
    'levels.3.blocks.0.': 7, 'levels.3.norm.': 7}


def expected_backbone(rate, offset_scale=1.0, small=1.0):
    """Name -> (lr, weight decay), from the table above and the rule of weight decay."""
    expected = {}
    for name, parameter in make_backbone().named_parameters():
        layers = [layer for start, layer in BACKBONE_LAYERS.items() if name.startswith(start)]
        assert len(layers) == 1, name
        scale = rate**(N + 1 - layers[0]) * (small if rate < 1 else 1.0)
        if '.offset_mask.' in name:
            scale *= offset_scale
        has_decay = parameter.dim() > 1  # all the backbone's norms and biases are vectors
        expected[name] = (LR * scale, WD if has_decay else 0.0)
    return expected


def assert_settings(found, expected, prefix=''):
    for name, (lr, decay) in expected.items():
        assert found[prefix + name] == (pytest.approx(lr), decay), name


@pytest.mark.parametrize('prefix', ['backbone', 'img_backbone', 'pts_backbone'])
@pytest.mark.parametrize('rate, offset_scale', [(1.0, 1.0), (0.9, 1.0), (0.8, 0.01)])
def test_backbone(prefix, rate, offset_scale):
    model = make_model(prefix)
    found = by_name(model, make_groups(model, layer_decay_rate=rate, num_layers=N,
                                       offset_lr_scale=offset_scale))
    assert_settings(found, expected_backbone(rate, offset_scale), prefix + '.')


@pytest.mark.parametrize('segmentor, head_embed_decay', [
    (False, True), (False, False), (True, True), (True, False)])
def test_head_and_neck(segmentor, head_embed_decay):
    rate, offset_scale = 0.5, 0.1
    model = make_model(segmentor=segmentor)
    found = by_name(model, make_groups(model, layer_decay_rate=rate, offset_lr_scale=offset_scale,
                                       head_embed_decay=head_embed_decay))
    first = LR * rate**(N + 1) if head_embed_decay else LR  # layer 0
    embedding = first if segmentor else LR
    offset = LR if segmentor else LR * offset_scale
    assert_settings(found, {
        'neck.0.weight': (LR, WD), 'neck.0.bias': (LR, 0.0), 'neck.1.weight': (LR, 0.0)})
    assert_settings(found, {
        'weight': (LR, WD), 'bias': (LR, 0.0), 'level_embed': (first, WD),
        'relative_position': (LR, 0.0), 'sampling_offsets': (offset, 0.0),
        'reference_points': (offset, WD), 'conv_offset': (offset, WD),
        'query_embed': (embedding, WD), 'query_feat': (embedding, WD),
        'cls_embed': (embedding, WD), 'mask_embed': (embedding, WD)},
        'decode_head.' if segmentor else 'bbox_head.')


def test_both_spellings_of_the_level_embedding():
    assert layer_id('bbox_head.transformer.level_embeds', DEPTHS) == 0
    assert layer_id('level_embed', DEPTHS) == 0
    assert layer_id('level_embed', DEPTHS, head_embed_decay=False) == N + 1


def test_small_backbone_rate_and_dino_head():
    model = make_model()
    found = by_name(model, make_groups(model, layer_decay_rate=0.5, backbone_small_lr=True,
                                       dino_head=True))
    assert_settings(found, expected_backbone(0.5, small=0.1), 'backbone.')
    assert_settings(found, {
        'bbox_head.sampling_offsets': (LR * 0.1, 0.0), 'bbox_head.conv_offset': (LR, WD),
        'bbox_head.reference_points': (LR * 0.1, WD), 'bbox_head.weight': (LR, WD)})


def test_custom_keys_multiply_and_the_longest_counts():
    model = make_model()
    groups = make_groups(model, layer_decay_rate=0.5, custom_keys={
        'bbox_head': dict(lr_mult=3.0), 'bbox_head.weight': dict(lr_mult=7.0),
        'patch_embed': dict(lr_mult=2.0)})
    found = by_name(model, groups)
    assert_settings(found, {
        'bbox_head.weight': (LR * 7, WD), 'bbox_head.bias': (LR * 3, 0.0),
        'neck.0.weight': (LR, WD),
        'backbone.patch_embed.conv1.weight': (LR * 2 * 0.5**(N + 1), WD)})
    names = [group['group_name'] for group in groups]
    assert len(set(names)) == len(names) and 'layer_8_decay_bbox_head.weight' in names
    assert all(group['lr'] == pytest.approx(LR * group['lr_scale']) for group in groups)


def test_frozen_parameters_are_left_out():
    model = make_model()
    for parameter in model.backbone.parameters():
        parameter.requires_grad = False
    found = by_name(model, make_groups(model, layer_decay_rate=0.9))
    assert all(lr == LR for name, (lr, _) in found.items() if name == 'neck.0.weight')
    assert not any(name.startswith('backbone') for name in found)


class Wrapper(nn.Module):
    """As DistributedDataParallel: the parameters get another `module.` in their names."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def wrap_backbone(model):
    model.backbone = Wrapper(model.backbone)
    return model


@pytest.mark.parametrize('wrap', [
    Wrapper, wrap_backbone, lambda model: nn.ModuleDict(dict(student=model)),
    lambda model: nn.ModuleDict(dict(_orig_mod=model))])
def test_wrapped_names(wrap):
    model = wrap(make_model())
    inner = model.module if isinstance(model, Wrapper) else model
    found = by_name(inner, make_groups(model, layer_decay_rate=0.7))
    for name, expected in expected_backbone(0.7).items():
        matches = [value for key, value in found.items() if key.endswith('.' + name)]
        assert matches == [(pytest.approx(expected[0]), expected[1])], name


def test_published_sizes():
    for arch, layers in dict(t=30, s=33, b=33, l=37).items():
        model = nn.Module()
        with torch.device('meta'):
            model.backbone = FlashInternImage(arch=arch)
        groups = make_groups(model, layer_decay_rate=0.9, num_layers=layers)
        found = by_name(model, groups)
        assert found['backbone.levels.3.blocks.0.dcn.value_proj.weight'][0] == pytest.approx(
            LR * 0.9**(layers + 1 - (layers - (5 if arch == 'l' else 4) + 1)))
        assert found['backbone.patch_embed.conv1.weight'][0] == pytest.approx(
            LR * 0.9**(layers + 1))


def test_without_settings_norms_have_no_decay():
    model = make_model()
    found = by_name(model, make_groups(model))
    assert_settings(found, expected_backbone(1.0), 'backbone.')


@pytest.mark.parametrize('paramwise, words', [
    (dict(num_layers=12), ('num_layers', '7', '12')),
    (dict(depths=(1, 2, 3, 2)), ('depths', '(1, 2, 3, 1)', '(1, 2, 3, 2)')),
    (dict(layer_decay_rate=0.0), ('layer_decay_rate', '0.0')),
    (dict(layer_decay_rate=1.5), ('layer_decay_rate', '1.5')),
    (dict(decay_rate=0.9), ('decay_rate', 'layer_decay_rate')),
    (dict(custom_keys=dict(neck=dict(decay_mult=0.0))), ('custom_keys', 'neck', 'decay_mult'))])
def test_bad_settings(paramwise, words):
    with pytest.raises(ValueError) as caught:
        make_groups(make_model(), **paramwise)
    assert all(word in str(caught.value) for word in words)


def test_other_models_are_refused():
    model = nn.ModuleDict(dict(backbone=nn.Conv2d(1, 1, 1)))
    with pytest.raises(ValueError, match='depths must be given'):
        make_groups(model)
    with pytest.raises(ValueError, match=r'backbone\.patch_embed'):
        make_groups(model, depths=(1, 1, 1, 1))
    with pytest.raises(ValueError, match='must set lr'):
        make_groups(make_model(), lr=None)


def test_a_step_and_a_saved_state():
    model = make_model()
    wrapper = build_optim_wrapper(model, dict(
        optimizer=dict(type='AdamW', lr=LR, weight_decay=WD),
        constructor='CustomLayerDecayOptimizerConstructor',
        paramwise_cfg=dict(layer_decay_rate=0.9)))
    before = model.backbone.patch_embed.conv1.weight.clone()
    sum(out.square().sum() for out in model.backbone(torch.randn(1, 3, 32, 32))).backward()
    wrapper.step()
    assert not torch.equal(before, model.backbone.patch_embed.conv1.weight)
    wrapper.load_state_dict(wrapper.state_dict())


def test_a_rate_of_one_makes_two_groups():
    """Of a model whose parameters all learn alike; 124 for FlashInternImage-T before."""
    groups = make_groups(make_model(), layer_decay_rate=1.0)
    assert sorted((group['group_name'], group['lr']) for group in groups) == [
        ('decay', LR), ('no_decay', LR)]
    groups = make_groups(make_model(), layer_decay_rate=1.0, offset_lr_scale=0.1)
    assert {group['group_name'] for group in groups} == {
        'decay', 'no_decay', 'decay_offset', 'no_decay_offset'}
    with pytest.raises(ValueError, match='must have parameters named'):
        make_groups(nn.Sequential(nn.Linear(2, 2)), depths=(1, 1, 1, 1), layer_decay_rate=1.0)
