# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The checkpoint converter on random weights in the layout of the released system."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config

from helpers.bevformer import CONFIGS
from helpers.tool_runner import load_tool
from mmdcnv4.bevformer_v2.models.box_code import decode_boxes

CONFIG = CONFIGS / 'bevformer-v2_r50_t8_16xb1-24e_nus.py'
C, LAYERS, FRAMES, WIDTH = 256, 6, 8, 512
MSDA = ('sampling_offsets', 'attention_weights', 'value_proj', 'output_proj')


@pytest.fixture(scope='module')
def converter():
    return load_tool('model_converters/bevformer_v2')


def linear(state, name, out_channels, in_channels):
    state[name + '.weight'] = torch.empty(out_channels, in_channels)
    state[name + '.bias'] = torch.empty(out_channels)


def norm(state, name, channels, is_batch_norm=False):
    for key in ('weight', 'bias') + (('running_mean', 'running_var') if is_batch_norm else ()):
        state[f'{name}.{key}'] = torch.empty(channels)
    if is_batch_norm:
        state[name + '.num_batches_tracked'] = torch.tensor(0)


def block(state, name, rest, norms=3):
    """What encoder and decoder layers have in common."""
    for index, (offsets, weights, wide) in rest.items():
        for key, out in zip(MSDA, (offsets, weights, C, C)):
            if out:
                linear(state, f'{name}.attentions.{index}.{key}', out,
                       wide if key in MSDA[:2] else C)
    linear(state, f'{name}.ffns.0.layers.0.0', 512, C)
    linear(state, f'{name}.ffns.0.layers.1', C, 512)
    for index in range(norms):
        norm(state, f'{name}.norms.{index}', C)


def bev_state():
    state, head = {}, 'pts_bbox_head'
    state[f'{head}.bev_embedding.weight'] = torch.empty(40000, C)
    for axis in ('row', 'col'):
        state[f'{head}.positional_encoding.{axis}_embed.weight'] = torch.empty(200, C // 2)
    state[f'{head}.query_embedding.weight'] = torch.empty(9900, 2 * C)
    state[f'{head}.code_weights'] = torch.empty(10)
    transformer = f'{head}.transformer'
    state[f'{transformer}.level_embeds'] = torch.empty(4, C)
    state[f'{transformer}.cams_embeds'] = torch.empty(6, C)
    linear(state, f'{transformer}.reference_points', 3, C)
    for i in range(LAYERS):
        name = f'{transformer}.encoder.layers.{i}'
        block(state, name, {0: (128, 64, 2 * C), '1.deformable_attention': (512, 256, C)})
        for key in ('weight', 'bias'):  # the inner attention has no output projection
            state[f'{name}.attentions.1.output_proj.{key}'] = state.pop(
                f'{name}.attentions.1.deformable_attention.output_proj.{key}')
        name = f'{transformer}.decoder.layers.{i}'
        block(state, name, {1: (64, 32, C)})
        state[f'{name}.attentions.0.attn.in_proj_weight'] = torch.empty(3 * C, C)
        state[f'{name}.attentions.0.attn.in_proj_bias'] = torch.empty(3 * C)
        linear(state, f'{name}.attentions.0.attn.out_proj', C, C)
        for index in (0, 3):
            linear(state, f'{head}.cls_branches.{i}.{index}', C, C)
            norm(state, f'{head}.cls_branches.{i}.{index + 1}', C)
        linear(state, f'{head}.cls_branches.{i}.6', 10, C)
        for index, out in ((0, C), (2, C), (4, 10)):
            linear(state, f'{head}.reg_branches.{i}.{index}', out, C)
    for i in range(3):
        name, wide = f'{transformer}.fusion.layers.{i}', FRAMES * C if i == 0 else WIDTH
        for number, channels in ((1, wide), (2, WIDTH)):
            state[f'{name}.conv{number}.weight'] = torch.empty(WIDTH, channels, 3, 3)
            norm(state, f'{name}.bn{number}', WIDTH, is_batch_norm=True)
    name = f'{transformer}.fusion.layers.0.downsample'
    state[f'{name}.conv.weight'] = torch.empty(WIDTH, FRAMES * C, 3, 3)
    norm(state, f'{name}.bn', WIDTH, is_batch_norm=True)
    linear(state, f'{transformer}.fusion.layer_norm.0', C, WIDTH)
    norm(state, f'{transformer}.fusion.layer_norm.1', C)
    return state


def mono_state():
    state, mono = {}, 'fcos3d_bbox_head'
    two, three = f'{mono}.fcos2d_head', f'{mono}.fcos3d_head'
    for tower in (f'{two}.cls_tower', f'{two}.box2d_tower', f'{three}.box3d_tower'):
        for i in range(4):
            state[f'{tower}.{i}.weight'] = torch.empty(C, C, 3, 3)
            for level in range(5):
                norm(state, f'{tower}.{i}.norm.{level}', C, is_batch_norm=True)
    for name, out in ((f'{two}.cls_logits', 10), (f'{two}.box2d_reg', 4), (f'{two}.centerness', 1),
                      (f'{three}.box3d_quat.0', 40), (f'{three}.box3d_ctr.0', 20),
                      (f'{three}.box3d_depth.0', 10), (f'{three}.box3d_size.0', 30),
                      (f'{three}.box3d_conf.0', 10), (f'{mono}.attr_logits', 3),
                      (f'{mono}.speed', 1)):
        state[f'{name}.weight'] = torch.empty(out, C, 3, 3)
        if 'depth' not in name:
            state[f'{name}.bias'] = torch.empty(out)
    for name in (f'{two}.scales_box2d_reg', f'{three}.scales_proj_ctr', f'{three}.scales_size',
                 f'{three}.scales_conf', f'{three}.scales_depth'):
        for level in range(5):
            state[f'{name}.{level}.scale'] = torch.empty(1)
    for level in range(5):
        state[f'{three}.offsets_depth.{level}.bias'] = torch.empty(1)
    state[f'{three}.mean_depth_per_level'] = torch.empty(5)
    return state


def test_a_released_state_dict_loads_completely(converter):
    with torch.device('meta'):
        model = MODELS.build(Config.fromfile(CONFIG).model)
        old = {**bev_state(), **mono_state()}
        parts = {f'{part}.{name}': torch.empty_like(tensor)
                 for part in ('img_backbone', 'img_neck')
                 for name, tensor in getattr(model, part).state_dict().items()}
        converted = converter.convert({**old, **parts})
    expected = model.state_dict()
    assert sorted(converted) == sorted(expected)
    assert {name: tensor.shape for name, tensor in converted.items()} == {
        name: tensor.shape for name, tensor in expected.items()}


def test_the_box_convention(converter):
    """A box in the old convention (width, length; yaw = -yaw - pi / 2) comes out in the new."""
    old = torch.tensor([1.0, 2, 0.6, 1.5, 3, 0.5, 0, 0, 4, 5])
    old_yaw = -1.1 - torch.pi / 2
    old[6], old[7] = torch.sin(torch.tensor(old_yaw)), torch.cos(torch.tensor(old_yaw))
    name = 'pts_bbox_head.reg_branches.3.4.bias'
    new = converter.convert({name: old})['bev_head.reg_branches.3.4.bias']
    box = decode_boxes(new)
    expected = torch.tensor([1, 2, 3, 1.5, 0.6, 0.5, 1.1, 4, 5])
    expected[3:6] = expected[3:6].exp()
    torch.testing.assert_close(box, expected)
    inner = converter.convert({'pts_bbox_head.reg_branches.3.2.bias': old})
    assert torch.equal(inner['bev_head.reg_branches.3.2.bias'], old)


def test_the_order_of_levels(converter):
    prefix = 'fcos3d_bbox_head.fcos3d_head.offsets_depth'
    state = {f'{prefix}.{level}.bias': torch.tensor([float(level)])
             for level in (3, 0, 2, 1, 4)}
    converted = converter.convert(state)
    assert converted['perspective_head.depth_offsets'].tolist() == [0, 1, 2, 3, 4]


def test_a_foreign_checkpoint(converter):
    with pytest.raises(ValueError, match="unknown name 'backbone.conv1.weight'"):
        converter.convert({'backbone.conv1.weight': torch.zeros(1)})
    bn = 'pts_bbox_head.transformer.fusion.layers.0.downsample.'
    with pytest.raises(ValueError, match='two tensors become'):
        converter.convert({bn + '1.weight': torch.zeros(1), bn + 'bn.weight': torch.zeros(1)})


def test_files(converter, tmp_path, capsys):
    name = 'pts_bbox_head.transformer.level_embeds'
    weights = {f'module.{name}': torch.ones(4, 8)}
    torch.save(dict(state_dict=weights, meta=dict(best=np.float64(1))), tmp_path / 'a.pth')
    converter.main([str(tmp_path / 'a.pth'), str(tmp_path / 'b.pth')])
    assert '1 tensors are in' in capsys.readouterr().out
    loaded = torch.load(tmp_path / 'b.pth', weights_only=True)['state_dict']
    assert list(loaded) == ['bev_encoder.level_embed']
    (tmp_path / 'page.pth').write_text('404: Not Found')
    for source, words in (('absent.pth', 'must be an existing file'), ('page.pth', '404')):
        with pytest.raises(SystemExit, match=f'error: .*{words}'):
            converter.main([str(tmp_path / source), str(tmp_path / 'b.pth')])
    for target, words in ((tmp_path, 'got the folder'), (tmp_path / 'c' / 'b.pth', 'c/b.pth')):
        with pytest.raises(SystemExit):
            converter.main([str(tmp_path / 'a.pth'), str(target)])
        assert words in capsys.readouterr().err
