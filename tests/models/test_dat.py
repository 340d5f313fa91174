# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""DAT, DAT+ and DAT++: sizes, names and weights that the published checkpoints rely on."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmdcnv4.models.backbones import DAT
from mmdcnv4.models.backbones.dat import ARCH_SETTINGS
from mmdcnv4.models.layers.dat_block import ConvFFN

TINY = dict(channels=16, blocks=('ND', 'LD', 'SX', 'PD'), heads=(1, 2, 4, 8), groups=(1, 1, 2, 4),
            img_size=64, drop_path_rate=0.0)
# parameters with the classifier's norm and linear layer, and of the backbone without either
COUNTS = {
    'dat_tiny': (28_319_138, None), 'dat_small': (49_700_402, None),
    'dat_base': (87_881_632, None), 'dat_plus_tiny': (22_772_796, 22_258_772),
    'dat_pp_tiny': (23_962_876, 23_448_852), 'dat_pp_small': (53_127_366, 52_356_830),
    'dat_pp_base': (93_690_640, 92_663_592)}
PARTS = {  # stem; stages; downsampling; bias tables; norms of the outputs
    'dat_pp_tiny': (19_584, (136_852, 851_152, 14_528_016, 6_363_168),
                    (73_984, 295_424, 1_180_672), 106_738, 1_920),
    'dat_pp_small': (43_200, (279_006, 1_866_552, 32_417_496, 14_264_240),
                     (166_272, 664_320, 2_655_744), 160_107, 2_880),
    'dat_pp_base': (76_032, (464_808, 3_268_256, 57_350_304, 25_307_456),
                    (295_424, 1_180_672, 4_720_640), 213_476, 3_840)}


def count(module):
    return sum(p.numel() for p in module.parameters())


def on_meta(arch, **options):
    with torch.device('meta'):
        return DAT(arch, **options)


@pytest.mark.parametrize('arch', ARCH_SETTINGS)
def test_parameter_counts(arch):
    classifier, backbone = COUNTS[arch]
    model = on_meta(arch, out_indices=(3,))
    width = model.norms['3'].norm.weight.numel()
    assert count(model) + 1000 * width + 1000 == classifier
    assert backbone in (None, count(model) - 2 * width)


@pytest.mark.parametrize('arch', PARTS)
def test_parameter_counts_of_the_parts(arch):
    stem, stages, downsampling, tables, norms = PARTS[arch]
    model = on_meta(arch)
    assert count(model.patch_proj) == stem and count(model.norms) == norms
    assert tuple(map(count, model.down_projs)) == downsampling
    assert tuple(map(count, model.stages)) == stages
    assert sum(p.numel() for name, p in model.named_parameters()
               if name.endswith('rpe_table')) == tables


@pytest.mark.parametrize('arch', ARCH_SETTINGS)
def test_forward_of_every_size(arch):
    model = DAT(arch).eval()
    with torch.no_grad():
        outs = model(torch.randn(1, 3, 64, 96))
    widths = [ARCH_SETTINGS[arch]['channels'] * 2**stage for stage in range(4)]
    assert [tuple(out.shape) for out in outs] == [
        (1, width, 16 // 2**i, 24 // 2**i) for i, width in enumerate(widths)]


def affine(key, width):
    return {f'{key}.weight': (width,), f'{key}.bias': (width,)}


def linear(key, width, out, *kernel):
    return {f'{key}.weight': (out, width, *kernel), f'{key}.bias': (out,)}


def block_shapes(stage, d, letter, c, heads, group, side, kernel, is_pp):
    """Keys and shapes of a block, written down from the description of the published files."""
    attn = f'stages.{stage}.attns.{d}'
    shapes = {}
    for n in (2 * d, 2 * d + 1):
        shapes.update(affine(f'stages.{stage}.layer_norms.{n}.norm', c))
    mlp = f'stages.{stage}.mlps.{d}'
    if is_pp:
        shapes.update(linear(f'stages.{stage}.local_perception_units.{d}', 1, c, 3, 3))
        shapes.update(linear(f'{mlp}.linear1.0', c, 4 * c, 1, 1))
        shapes.update(linear(f'{mlp}.linear2.0', 4 * c, c, 1, 1))
        shapes.update(linear(f'{mlp}.dwc', 1, 4 * c, 3, 3))
    else:
        shapes.update(linear(f'{mlp}.chunk.linear1', c, 4 * c))
        shapes.update(linear(f'{mlp}.chunk.linear2', 4 * c, c))
    if letter == 'D':
        for name in 'qkv':
            shapes.update(linear(f'{attn}.proj_{name}', c, c, 1, 1))
        width = c // group
        shapes.update(linear(f'{attn}.proj_out', c, c, 1, 1))
        shapes.update(linear(f'{attn}.conv_offset.0', 1, width, kernel, kernel))
        shapes.update(affine(f'{attn}.conv_offset.1.norm', width))
        shapes[f'{attn}.conv_offset.3.weight'] = (2, width, 1, 1)
        shapes[f'{attn}.rpe_table'] = (heads, 2 * side - 1, 2 * side - 1)
    elif letter == 'N':
        shapes.update(linear(f'{attn}.qkv', c, 3 * c))
        shapes.update(linear(f'{attn}.proj', c, c))
        shapes[f'{attn}.rpb'] = (heads, 13, 13)
    else:
        shapes.update(linear(f'{attn}.proj_qkv', c, 3 * c))
        shapes.update(linear(f'{attn}.proj_out', c, c))
        shapes[f'{attn}.relative_position_bias_table'] = (169, heads)
    return shapes


@pytest.mark.parametrize('arch, letters, groups', [
    ('dat_pp_tiny', ('ND', 'NDND', 'ND' * 9, 'DD'), (1, 2, 4, 8)),
    ('dat_tiny', ('LS', 'LS', 'LDLDLD', 'LD'), (0, 0, 3, 6))])
def test_state_dict_keys(arch, letters, groups):
    is_pp, width = ('pp' in arch), (64 if 'pp' in arch else 96)
    kernel = 3 if is_pp else 2
    if is_pp:
        expected = {**linear('patch_proj.0', 3, width // 2, 3, 3),
                    **affine('patch_proj.1.norm', width // 2)}
    else:
        expected = {**linear('patch_proj.0', 3, width, 4, 4), **affine('patch_proj.1.norm', width)}
    if is_pp:
        expected.update(linear('patch_proj.3', width // 2, width, 3, 3))
        expected.update(affine('patch_proj.4.norm', width))
    for stage in range(4):
        c, heads = width * 2**stage, width * 2**stage // 32
        expected.update(affine(f'norms.{stage}.norm', c))
        if stage < 3:
            expected[f'down_projs.{stage}.0.weight'] = (2 * c, c, kernel, kernel)
            expected.update(affine(f'down_projs.{stage}.1.norm', 2 * c))
        for d, letter in enumerate(letters[stage]):
            expected.update(block_shapes(stage, d, letter, c, heads, groups[stage] or 1,
                                         56 // 2**stage, (9, 7, 5, 3)[stage], is_pp))
    actual = {key: tuple(value.shape) for key, value in on_meta(arch).state_dict().items()}
    assert actual == expected


def test_tables_are_stretched_over_larger_images():
    """A query and a key that are as far apart, relative to the map, have the same bias."""
    model = DAT('dat_pp_tiny').eval()
    layer = model.stages[3].attns[0]
    nn.init.normal_(layer.rpe_table)
    points = torch.zeros(layer.groups, 1, 2)
    ends = [layer._bias(points, 0, side * side, (side, side)).flatten(2)[..., [0, side - 1, -1]]
            for side in (7, 12)]  # of 224 and of 384
    torch.testing.assert_close(*ends)
    with torch.no_grad():
        assert model(torch.randn(1, 3, 384, 384))[3].shape == (1, 512, 12, 12)
    assert on_meta('dat_pp_base', img_size=384).stages[0].attns[1].rpe_table.shape == (4, 191, 191)


def block_by_hand(stage, index, x):
    """Section 2 of the description."""
    x = x + stage.local_perception_units[index](x)
    norms, scales = stage.layer_norms, stage.layer_scales
    x = x + scales[2 * index](stage.attns[index](norms[2 * index](x)))
    return x + scales[2 * index + 1](stage.mlps[index](norms[2 * index + 1](x)))


@torch.no_grad()
def test_blocks():
    model = DAT(**dict(TINY, use_lpu=True, use_dwc_mlp=True, layer_scale=0.5)).eval()
    x = torch.randn(2, 16, 8, 8)
    expected = block_by_hand(model.stages[0], 1, block_by_hand(model.stages[0], 0, x))
    torch.testing.assert_close(model.stages[0](x), expected)
    # block X has one branch
    stage, x = model.stages[2], torch.randn(1, 64, 4, 5)
    y = x + stage.local_perception_units[1](x)
    normed = F.layer_norm(stage.attns[1](y).permute(0, 2, 3, 1), (64,)).permute(0, 3, 1, 2)
    torch.testing.assert_close(stage._block(x, 1), y + stage.mlps[1](normed))


@torch.no_grad()
def test_feed_forward_network_adds_the_depthwise_convolution_before_the_activation():
    layer, x = ConvFFN(4, 2.0), torch.randn(1, 4, 5, 6)
    hidden = F.conv2d(x, layer.linear1[0].weight, layer.linear1[0].bias)
    hidden = hidden + F.conv2d(hidden, layer.dwc.weight, layer.dwc.bias, padding=1, groups=8)
    torch.testing.assert_close(layer(x), layer.linear2(F.gelu(hidden)))


def test_drop_path_grows_over_the_whole_network():
    rates = [drop.drop_prob for stage in DAT('dat_tiny', drop_path_rate=0.22).stages
             for drop in stage.drop_path]
    assert rates == pytest.approx([0.02 * index for index in range(12)])


def test_initial_values():
    model = DAT('dat_plus_tiny')
    model.init_weights()
    tables = {name.rpartition('.')[2]: p.detach() for name, p in model.named_parameters()
              if name.endswith(('rpe_table', 'rpb'))}
    assert tables['rpe_table'].std() == pytest.approx(0.01, rel=0.1)
    assert tables['rpb'].std() == pytest.approx(0.02, rel=0.1)
    bound = 512**-0.5  # that of torch for a linear layer
    weight = model.stages[3].attns[0].proj_q.weight.detach()
    assert 0.95 * bound < weight.abs().max() <= bound
    assert (model.norms['0'].norm.weight == 1).all()


def save(tmp_path, weights):
    path = tmp_path / 'weights.pth'
    torch.save({'model': weights}, path)
    return dict(type='Pretrained', checkpoint=str(path))


def published(model):
    """The state dict of a classifier of the same layers, as it is published."""
    weights = {key: torch.randn_like(value) for key, value in model.state_dict().items()
               if not key.startswith('norms.')}
    width = model.norms['3'].norm.weight.numel()
    return {**weights, 'cls_norm.norm.weight': torch.ones(width),
            'cls_head.weight': torch.zeros(1000, width),
            'stages.1.attns.0.relative_position_index': torch.zeros(49, 49),
            'stages.2.attns.0.attn_mask': torch.zeros(4, 49, 49)}


def test_a_published_classifier_is_loaded(tmp_path):
    source = DAT(**TINY, layer_scale=1.0)
    weights = published(source)
    renamed = {key.replace('.gamma', '.weight'): value for key, value in weights.items()}
    assert renamed.keys() != weights.keys()
    model = DAT(**TINY, layer_scale=1.0, init_cfg=save(tmp_path, renamed))
    model.init_weights()
    loaded = model.state_dict()
    for key, value in loaded.items():
        if key.startswith('norms.'):
            assert (value == float(key.endswith('weight'))).all()
        else:
            assert torch.equal(value, weights[key]), key


def test_tables_of_another_size_are_resized_bicubically(tmp_path):
    weights = published(DAT(**TINY))
    model = DAT(**dict(TINY, img_size=96, window_size=5), init_cfg=save(tmp_path, weights))
    model.init_weights()
    table, old = model.stages[0].attns[1].rpe_table, weights['stages.0.attns.1.rpe_table']
    assert table.shape == (1, 47, 47) and old.shape == (1, 31, 31)
    expected = F.interpolate(old[None], (47, 47), mode='bicubic')[0]
    assert torch.equal(table, expected)
    table = model.stages[1].attns[0].relative_position_bias_table
    old = weights['stages.1.attns.0.relative_position_bias_table'].view(1, 13, 13, 2)
    expected = F.interpolate(old.permute(0, 3, 1, 2), (9, 9), mode='bicubic')
    torch.testing.assert_close(table.view(9, 9, 2), expected[0].permute(1, 2, 0))


def test_weights_that_do_not_fit_are_refused(tmp_path):
    weights = published(DAT(**TINY))
    del weights['stages.0.attns.0.rpb']
    with pytest.raises(ValueError, match=r'missing 1 \(stages.0.attns.0.rpb\)'):
        DAT(**TINY, init_cfg=save(tmp_path, weights)).init_weights()
    with pytest.raises(FileNotFoundError, match='LeapLabTHU/DAT'):
        DAT(**TINY, init_cfg=dict(type='Pretrained', checkpoint='absent.pth')).init_weights()


@pytest.mark.parametrize('options, name, value', [
    (dict(arch='dat_large'), 'arch', "'dat_large'"), (dict(arch=['dat_tiny']), 'arch', 'dat_tiny'),
    (dict(channels=16), 'blocks, heads, groups', 'None'),
    (dict(TINY, channels=15), 'channels', '15'), (dict(TINY, channels=0), 'channels', '0'),
    (dict(TINY, blocks=('ND', 'ND', 'ND')), 'blocks', "('ND', 'ND', 'ND')"),
    (dict(TINY, blocks=('ND', 'ND', 'ND', 'NQ')), 'blocks', 'NQ'),
    (dict(TINY, blocks=('ND', '', 'ND', 'ND')), 'blocks', "''"),
    (dict(TINY, blocks='ND'), 'blocks', "'ND'"),
    (dict(TINY, heads=(1, 2, 4)), 'heads', '(1, 2, 4)'),
    (dict(TINY, heads=(3, 2, 4, 8)), 'heads[0]', 'got 3'),
    (dict(TINY, groups=(1, 1, 3, 3)), 'groups[3]', 'got 3'),
    (dict(TINY, strides=(0, 1, 1, 1)), 'strides', '(0, 1, 1, 1)'),
    (dict(TINY, offset_kernels=(9, 7, 5, 4)), 'offset_kernels[3]', 'got 4'),
    (dict(TINY, offset_kernels=(5, 7, 5, 3)), 'offset_kernels[0]', 'got 5'),
    (dict(TINY, kernel_size=6), 'kernel_size', '6'),
    (dict(TINY, window_size=0), 'window_size', '0'),
    (dict(TINY, mlp_ratio=-1), 'mlp_ratio', '-1'), (dict(TINY, img_size=100), 'img_size', '100'),
    (dict(TINY, offset_range_factor=-2), 'offset_range_factor', '-2'),
    (dict(TINY, ref_mode='v2'), 'ref_mode', "'v2'"),
    (dict(TINY, position_bias='table'), 'position_bias', "'table'"),
    (dict(TINY, layer_scale='x'), 'layer_scale', "'x'"),
    (dict(TINY, use_lpu='yes'), 'use_lpu', "'yes'")])
def test_bad_arguments(options, name, value):
    with pytest.raises(ValueError) as caught:
        DAT(**options)
    assert name in str(caught.value) and value in str(caught.value)
