# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""FlashInternImage: numbers, names, shapes and states that its published weights rely on.

The golden files hold the four maps of the published T and S, computed in float64 outside this
project; weights are drawn from the state-dict keys, so that a renamed key changes the result.
"""

from __future__ import annotations

import copy
import itertools
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from mmdcnv4.engine.optimizers.layer_decay import layer_id
from mmdcnv4.models.backbones import FlashInternImage
from mmdcnv4.ops import DCNv4

DATA = Path(__file__).parent.parent / 'data'
TINY = dict(channels=16, depths=(1, 2, 2, 1), groups=(1, 2, 4, 8))
# Every option of the family at once, including those of the largest models.
LARGE_OPTIONS = dict(
    TINY, res_post_norm=True, level2_post_norm=True, level2_post_norm_block_ids=(0, 1),
    center_feature_scale=True, dw_kernel_size=5, mlp_fc2_bias=True, dcn_output_bias=True)
POST_NORM = dict(TINY, post_norm=True, layer_scale=0.5, dw_kernel_size=3, offset_scale=2.0)


def golden_value(key: str, shape: tuple) -> np.ndarray:
    """The start value that the golden files define for a key."""
    noise = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if 'gamma' in key:
        return 0.5 + 0.1 * noise
    if len(shape) >= 2:
        scale = 0.5 if 'offset_mask.weight' in key else 1.0
        return scale * noise / np.sqrt(np.prod(shape[1:]))
    if 'norm' in key and key.endswith('weight'):
        return 1 + 0.1 * noise
    return (0.3 if key.endswith('offset_mask.bias') else 0.1) * noise


def fill(model: nn.Module) -> nn.Module:
    """Fills every parameter from its key, so that all branches are active."""
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            tensor.copy_(torch.from_numpy(np.asarray(golden_value(key, tuple(tensor.shape)))))
    return model


def build(seed: int = 0, **options) -> FlashInternImage:
    torch.manual_seed(seed)
    return fill(FlashInternImage(drop_path_rate=options.pop('drop_path_rate', 0.0), **options))


@pytest.mark.parametrize('arch', ['t', 's'])
def test_golden(arch):
    golden = np.load(DATA / f'flash_intern_image_{arch}.npz')
    image = np.random.RandomState(7).standard_normal((1, 3, 72, 104))
    model = build(arch=arch, layer_scale=1.0, drop_path_rate=0.2).eval()
    # 1e-4 in float32: 2e-5 was the worst seen, in the last map of S
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-6)):
        fill(model.to(dtype))
        with torch.no_grad():
            outs = model(torch.from_numpy(image).to(dtype))
        for index, out in enumerate(outs):
            expected = golden[f'out{index}'].astype(np.float64)
            error = np.linalg.norm(out.double().numpy() - expected) / np.linalg.norm(expected)
            assert error < tolerance, (index, dtype, error)


@pytest.mark.parametrize('arch, expected', [
    ('t', 28_651_776), ('s', 48_490_176), ('b', 94_897_048), ('l', 218_914_640)])
def test_parameter_count(arch, expected):
    with torch.device('meta'):
        model = FlashInternImage(arch=arch)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_parameter_count_with_layer_scale():
    with torch.device('meta'):
        model = FlashInternImage(arch='t', layer_scale=1.0)
    assert sum(p.numel() for p in model.parameters()) == 28_666_624
    blocks = [level.blocks[0] for level in model.levels]
    assert [sum(p.numel() for p in block.parameters()) for block in blocks] == [
        48_944, 193_112, 769_200, 3_070_304]


def expected_shapes(channels, depths, groups, *, post_norm=False, gamma=False, dw=None,
                    fc2_bias=False, output_bias=False, res_post_norm=False, post_norms=0,
                    center=False):
    """Keys and shapes of the published state dicts, written down from their description."""
    shapes = {}

    def affine(key, width):
        shapes[f'{key}.weight'], shapes[f'{key}.bias'] = (width,), (width,)

    half = channels // 2
    shapes.update({
        'patch_embed.conv1.weight': (half, 3, 3, 3), 'patch_embed.conv1.bias': (half,),
        'patch_embed.conv2.weight': (channels, half, 3, 3), 'patch_embed.conv2.bias': (channels,)})
    affine('patch_embed.norm1.1', half)
    affine('patch_embed.norm2.1', channels)
    for i in range(4):
        c, level = channels * 2**i, f'levels.{i}'
        predictor = -(-27 * groups[i] // 8) * 8
        for j in range(depths[i]):
            block = f'{level}.blocks.{j}'
            norms = ['norm1.0', 'norm2.0']
            norms += ['res_post_norm1.0', 'res_post_norm2.0'] if res_post_norm else []
            for norm in norms:
                affine(f'{block}.{norm}', c)
            shapes.update({
                f'{block}.dcn.offset_mask.weight': (predictor, c),
                f'{block}.dcn.offset_mask.bias': (predictor,),
                f'{block}.dcn.value_proj.weight': (c, c), f'{block}.dcn.value_proj.bias': (c,),
                f'{block}.dcn.output_proj.weight': (c, c),
                f'{block}.mlp.fc1.weight': (4 * c, c), f'{block}.mlp.fc1.bias': (4 * c,),
                f'{block}.mlp.fc2.weight': (c, 4 * c)})
            if output_bias:
                shapes[f'{block}.dcn.output_proj.bias'] = (c,)
            if fc2_bias:
                shapes[f'{block}.mlp.fc2.bias'] = (c,)
            if dw:
                shapes[f'{block}.dcn.offset_mask_dw.weight'] = (c, 1, dw, dw)
                shapes[f'{block}.dcn.offset_mask_dw.bias'] = (c,)
            if center:
                shapes[f'{block}.dcn.center_feature_scale_proj_weight'] = (groups[i], c)
                shapes[f'{block}.dcn.center_feature_scale_proj_bias'] = (groups[i],)
            if gamma:
                shapes[f'{block}.gamma1'] = shapes[f'{block}.gamma2'] = (c,)
        if not post_norm or center:
            affine(f'{level}.norm.0', c)
        for n in range(post_norms if i == 2 else 0):
            affine(f'{level}.post_norms.{n}.0', c)
        if i < 3:
            shapes[f'{level}.downsample.conv.weight'] = (2 * c, c, 3, 3)
            affine(f'{level}.downsample.norm.1', 2 * c)
    return shapes


@pytest.mark.parametrize('options, expected', [
    (dict(arch='t'), expected_shapes(64, (4, 4, 18, 4), (4, 8, 16, 32))),
    (dict(arch='s'), expected_shapes(80, (4, 4, 21, 4), (5, 10, 20, 40), post_norm=True,
                                     gamma=True, dw=3)),
    (dict(arch='b', layer_scale=None), expected_shapes(112, (4, 4, 21, 4), (7, 14, 28, 56),
                                                       post_norm=True, dw=3)),
    (dict(arch='l'), expected_shapes(160, (5, 5, 22, 5), (10, 20, 40, 80), post_norm=True,
                                     gamma=True, dw=3, fc2_bias=True, output_bias=True)),
    (LARGE_OPTIONS, expected_shapes(16, (1, 2, 2, 1), (1, 2, 4, 8), dw=5, fc2_bias=True,
                                    output_bias=True, res_post_norm=True, post_norms=2,
                                    center=True)),
])
def test_state_dict_keys(options, expected):
    with torch.device('meta'):
        model = FlashInternImage(**options)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == expected


def test_offset_scale_follows_arch():
    with torch.device('meta'):
        scales = {arch: FlashInternImage(arch=arch).levels[1].blocks[0].dcn.geometry.offset_scale
                  for arch in 'tsbl'}
        own = FlashInternImage(arch='l', offset_scale=0.25)
    assert scales == dict(t=1.0, s=1.0, b=0.5, l=2.0)
    assert own.levels[0].blocks[0].dcn.geometry.offset_scale == 0.25


@pytest.mark.parametrize('options', [TINY, POST_NORM, LARGE_OPTIONS])
def test_odd_image_batch_and_memory_order(options):
    model = build(**options).eval()
    images = torch.randn(2, 3, 225, 331)
    with torch.no_grad():
        outs = model(images)
        singles = [model(image[None]) for image in images]
    assert [tuple(out.shape) for out in outs] == [
        (2, 16, 57, 83), (2, 32, 29, 42), (2, 64, 15, 21), (2, 128, 8, 11)]
    for index, out in enumerate(outs):
        assert out.is_contiguous()
        torch.testing.assert_close(out, torch.cat([single[index] for single in singles]),
                                   rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_contiguous_outputs_whatever_the_input(memory_format):
    model = build(**TINY)
    outs = model(torch.randn(2, 3, 40, 56).contiguous(memory_format=memory_format))
    assert all(out.stride(3) == 1 and out.stride(1) == out.shape[2] * out.shape[3]
               for out in outs)


def test_smallest_image():
    outs = build(**TINY).eval()(torch.randn(1, 3, 1, 5))
    assert [tuple(out.shape[2:]) for out in outs] == [(1, 2), (1, 1), (1, 1), (1, 1)]


@pytest.mark.parametrize('out_indices', [(0,), (1, 3), (1, 2, 3), [2]])
def test_out_indices(out_indices):
    images = torch.randn(1, 3, 48, 64)
    every = build(**TINY).eval()(images)
    chosen = build(**TINY, out_indices=out_indices).eval()(images)
    assert len(chosen) == len(out_indices)
    for out, index in zip(chosen, out_indices):
        assert torch.equal(out, every[index])


@pytest.mark.parametrize('frozen_stages', [-1, 0, 2, 4])
def test_frozen_stages(frozen_stages):
    model = build(**TINY, frozen_stages=frozen_stages, drop_rate=0.5)
    model.train()
    loss = sum(out.sum() for out in model(torch.randn(1, 3, 32, 32)))
    assert loss.requires_grad == (frozen_stages < 4)
    if loss.requires_grad:
        loss.backward()
    for name, parameter in model.named_parameters():
        stage = 0 if name.startswith('patch_embed') else 1 + int(name.split('.')[1])
        assert parameter.requires_grad == (stage > frozen_stages), name
        assert (parameter.grad is None) == (stage <= frozen_stages), name
    assert [model.patch_embed.training] + [level.training for level in model.levels] == [
        stage > frozen_stages for stage in range(5)]


SUBSETS = [dict(out_indices=indices) for count in range(1, 5)
           for indices in itertools.combinations(range(4), count)]


@pytest.mark.parametrize('options', [
    *SUBSETS, POST_NORM, LARGE_OPTIONS, dict(LARGE_OPTIONS, layer_scale=1.0),
    dict(LARGE_OPTIONS, post_norm=True), dict(core_op='DCNv3', res_post_norm=True, layer_scale=1.0),
    dict(frozen_stages=2, out_indices=(0, 2))])
def test_every_trainable_parameter_has_a_gradient(options):
    """DistributedDataParallel stops at the first step where one has none."""
    model = build(**dict(TINY, **options)).train()
    sum(out.square().sum() for out in model(torch.randn(1, 3, 32, 32))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == (parameter.grad is not None), name


@pytest.mark.parametrize('options', [TINY, POST_NORM])
def test_checkpointing_gives_the_same_gradients(options):
    images = torch.randn(2, 3, 40, 56)
    grads = []
    for with_cp in (False, True):
        model = build(**options, with_cp=with_cp, drop_path_rate=0.5).train()
        torch.manual_seed(3)  # the same samples skip the same branches
        sum((out**2).sum() for out in model(images)).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert grads[0]['patch_embed.conv1.weight'].abs().sum() > 0
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-5, atol=1e-6, msg=name)


def test_checkpointing_keeps_fewer_tensors():
    def saved_bytes(with_cp):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        model = build(**TINY, with_cp=with_cp).train()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.randn(1, 3, 64, 64))
        return total

    assert saved_bytes(True) < 0.5 * saved_bytes(False)


@pytest.mark.parametrize('options', [TINY, POST_NORM, LARGE_OPTIONS])
def test_autocast(options):
    model = build(**options).eval()
    images = torch.randn(2, 3, 40, 56)
    expected = model(images)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outs = model(images)
    sum(out.float().sum() for out in outs).backward()
    for out, reference in zip(outs, expected):
        # bfloat16 has 8 bits; 0.07 was the worst over five seeds, in the last map
        assert (out - reference).norm() < 0.1 * reference.norm()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_copies_and_empty_batches():
    model = build(**POST_NORM).eval()
    images = torch.randn(1, 3, 32, 32)
    for out, expected in zip(copy.deepcopy(model)(images), model(images)):
        assert torch.equal(out, expected)
    assert [tuple(out.shape) for out in model(images[:0])] == [
        (0, 16, 8, 8), (0, 32, 4, 4), (0, 64, 2, 2), (0, 128, 1, 1)]


def test_drop_path_acts_in_training_only():
    model = build(**TINY, drop_path_rate=0.9)
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(0)
    first = model.train()(images)[3]
    assert not torch.equal(first, model(images)[3])
    assert torch.equal(model.eval()(images)[3], model(images)[3])


@pytest.mark.parametrize('kind, expected', [
    ('linear', [0, 0.1, 0.2, 0.3, 0.4, 0.5]), ('uniform', [0.5] * 6)])
def test_drop_path_rates(kind, expected):
    model = FlashInternImage(**TINY, drop_path_rate=0.5, drop_path_type=kind)
    rates = [block.drop_path.drop_prob for level in model.levels for block in level.blocks]
    assert rates == pytest.approx(expected)


def block_by_hand(block, x, mode):
    """Section 3.3 of the description, one line per mode."""
    f, g = block.dcn, block.mlp
    if mode == 'pre':
        x = x + block.gamma1 * f(block.norm1(x))
        return x + block.gamma2 * g(block.norm2(x))
    if mode == 'post':
        x = x + block.gamma1 * block.norm1(f(x))
        return x + block.gamma2 * block.norm2(g(x))
    x = x + block.res_post_norm1(f(block.norm1(x)))
    return x + block.res_post_norm2(g(block.norm2(x)))


@pytest.mark.parametrize('mode, options', [
    ('pre', dict(layer_scale=1.0)), ('post', dict(layer_scale=1.0, post_norm=True)),
    ('res_post', dict(res_post_norm=True))])
def test_residual_modes(mode, options):
    block = build(**TINY, **options).eval().levels[1].blocks[0]
    x = torch.randn(2, 5, 7, 32)
    torch.testing.assert_close(block(x), block_by_hand(block, x, mode))


def test_extra_norms_of_the_third_stage():
    model = build(**LARGE_OPTIONS).eval()
    stage, x = model.levels[2], torch.randn(1, 5, 6, 64)
    expected = stage.post_norms[0](stage.blocks[0](x))
    expected = stage.norm(stage.post_norms[1](stage.blocks[1](expected)))
    torch.testing.assert_close(stage(x), expected)


def test_center_feature_scale_reaches_the_operator():
    model = build(**LARGE_OPTIONS)
    model(torch.randn(1, 3, 32, 32))[3].sum().backward()
    gate = model.levels[0].blocks[0].dcn.center_feature_scale_proj_weight
    assert gate.grad.abs().sum() > 0


def assert_start_state(model):
    for name, module in model.named_modules():
        if isinstance(module, DCNv4):
            assert not module.offset_mask.weight.any() and not module.offset_mask.bias.any(), name
            bound = (6 / (2 * module.channels))**0.5  # Xavier uniform
            assert 0.9 * bound < module.value_proj.weight.abs().max() <= bound
        elif isinstance(module, nn.Linear) and 'mlp' in name:
            assert 0.015 < module.weight.std() < 0.025
            assert module.bias is None or not module.bias.any()


@pytest.mark.parametrize('mask_init, masks', [
    (1 / 9, 1 / 9), ('box', 1 / 9), ('center', torch.eye(9)[4])])
def test_start_of_the_masks(mask_init, masks):
    model = FlashInternImage(mask_init=mask_init, **TINY)
    model.init_weights()
    for layer in (module for module in model.modules() if isinstance(module, DCNv4)):
        bias = layer.offset_mask.bias[:27 * layer.channels // 16].view(-1, 27)
        assert not bias[:, :18].any() and (bias[:, 18:] == torch.as_tensor(masks)).all()
        assert not layer.offset_mask.weight.any()
        x = torch.ones(1, 4, 5, layer.channels)  # inside, masks of sum 1 on equal pixels
        expected = layer.output_proj(layer.value_proj(x))[:, 1:-1, 1:-1]
        torch.testing.assert_close(layer(x)[:, 1:-1, 1:-1], expected)


def test_start_state():
    model = FlashInternImage(**TINY, layer_scale=1e-5)
    assert_start_state(model)
    assert (model.levels[3].blocks[0].gamma2 == 1e-5).all()
    x = torch.randn(1, 4, 4, 16)
    assert not model.levels[0].blocks[0].dcn(x).any()
    model.init_weights()
    assert_start_state(model)
    model.init_weights()  # a second call changes nothing
    assert_start_state(model)


@pytest.mark.parametrize('init_cfg', [
    dict(type='Normal', layer='Linear', std=0.7, bias=0.3),
    [dict(type='Constant', layer=['LayerNorm'], val=3.0),
     dict(type='TruncNormal', layer='Linear', std=0.7)],
    [dict(type='Constant', layer='OffsetMaskProj', val=5.0, bias=5.0),
     dict(type='Normal', layer='Linear', std=0.7)]])
def test_start_state_with_initialisers_of_mmengine(init_cfg):
    model = FlashInternImage(**TINY, init_cfg=init_cfg)
    model.init_weights()
    assert model.levels[0].blocks[0].mlp.fc1.weight.std() > 0.4  # the initialiser ran
    for module in model.modules():
        if isinstance(module, DCNv4):
            assert not module.offset_mask.weight.any() and not module.offset_mask.bias.any()
            bound = (6 / (2 * module.channels))**0.5  # Xavier uniform, not the initialiser's
            assert module.value_proj.weight.abs().max() <= bound
    assert model.init_cfg == init_cfg


BAD_ARGUMENTS = [
    (dict(arch='xl'), 'arch', "'xl'"),
    (dict(channels=16), 'depths, groups', 'None'),
    (dict(TINY, channels=15), 'channels', '15'),
    (dict(TINY, depths=(1, 1, 1)), 'depths', '(1, 1, 1)'),
    (dict(TINY, depths=(1, 0, 1, 1)), 'depths', '(1, 0, 1, 1)'),
    (dict(TINY, groups=(1, 2, 4, 8, 16)), 'groups', '16'),
    (dict(TINY, groups=(1, 3, 4, 8)), 'groups[1]', 'got 3'),
    (dict(arch='t', groups=(5, 8, 16, 32)), 'groups[0]', 'got 5'),
    (dict(TINY, out_indices=(0, 4)), 'out_indices', '(0, 4)'),
    (dict(TINY, out_indices=(1, 0)), 'out_indices', '(1, 0)'),
    (dict(TINY, out_indices=()), 'out_indices', '()'),
    (dict(TINY, frozen_stages=5), 'frozen_stages', '5'),
    (dict(TINY, core_op='DCNv2'), 'core_op', "'DCNv2'"),
    (dict(TINY, norm_layer='BN'), 'norm_layer', "'BN'"),
    (dict(TINY, act_layer='Tanh'), 'act_layer', "'Tanh'"),
    (dict(TINY, drop_path_rate=1.0), 'drop_path_rate', '1.0'),
    (dict(TINY, drop_path_type='cosine'), 'drop_path_type', "'cosine'"),
    (dict(TINY, level2_post_norm=True), 'level2_post_norm_block_ids', '()'),
    (dict(TINY, level2_post_norm=True, level2_post_norm_block_ids=(2,)),
     'level2_post_norm_block_ids', '(2,)'),
    (dict(TINY, dw_kernel_size=4), 'dw_kernel_size', '4'),
    (dict(TINY, pretrained='weights.pth'), 'pretrained', "'weights.pth'"),
    (dict(TINY, pretrained=True), 'pretrained', 'True'),
    (dict(TINY, depths=4), 'depths', 'got 4'),
    (dict(TINY, groups='1248'), 'groups', "'1248'"),
    (dict(TINY, channels='abc'), 'channels', "'abc'"),
    (dict(TINY, out_indices=3), 'out_indices', 'got 3'),
    (dict(arch=['t']), 'arch', "['t']"),
    (dict(TINY, core_op=['DCNv4']), 'core_op', "['DCNv4']"),
    (dict(TINY, layer_scale='x'), 'layer_scale', "'x'"),
    (dict(TINY, dw_kernel_size='x'), 'dw_kernel_size', "'x'"),
    (dict(TINY, mlp_ratio=-1), 'mlp_ratio', '-1'),
    (dict(TINY, offset_scale=0), 'offset_scale', '0'),
    (dict(TINY, in_channels=0), 'in_channels', '0'),
    (dict(TINY, drop_rate=1.5), 'drop_rate', '1.5'),
    (dict(TINY, drop_path_rate='x'), 'drop_path_rate', "'x'"),
    (dict(TINY, level2_post_norm=True, level2_post_norm_block_ids=1),
     'level2_post_norm_block_ids', 'got 1'),
]


@pytest.mark.parametrize('options, name, value', BAD_ARGUMENTS)
def test_bad_arguments(options, name, value):
    with pytest.raises(ValueError) as caught:
        FlashInternImage(**options)
    assert name in str(caught.value) and value in str(caught.value)


def test_a_layer_scale_that_starts_at_zero():
    assert not FlashInternImage(**TINY, layer_scale=0).levels[0].blocks[0].gamma1.any()


def test_init_cfg_without_a_checkpoint():
    with pytest.raises(ValueError, match='init_cfg .* must have checkpoint'):
        FlashInternImage(**TINY, init_cfg=dict(type='Pretrained')).init_weights()


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match='num_classes'):
        FlashInternImage(**TINY, num_classes=1000)


def test_model_zoo_name_of_another_backbone_is_ignored_aloud():
    with pytest.warns(UserWarning, match='open-mmlab://resnet50_v1c'):
        FlashInternImage(**TINY, pretrained='open-mmlab://resnet50_v1c')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        FlashInternImage(**TINY, pretrained=None)


@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32), (1, 3, 32)])
def test_bad_images(shape):
    with pytest.raises(ValueError, match=r'\(N, 3, H, W\)'):
        FlashInternImage(**TINY)(torch.zeros(shape))


def test_sizes_of_ones_own_by_a_dict():
    sizes = dict(channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8), layer_scale=1.0)
    model = FlashInternImage(sizes, depths=(1, 2, 1, 1))
    assert model.channels == 16 and model.depths == (1, 2, 1, 1)
    with pytest.raises(ValueError, match=r"FlashInternImage: arch must be .* got \['width'\]"):
        FlashInternImage(dict(sizes, width=3))
    with pytest.raises(TypeError, match='positional'):
        FlashInternImage('t', 64)


def test_layer_depths_are_those_of_the_recipes():
    """`get_layer_depth`, which mmpretrain asks for, and the optimizer constructor agree."""
    model = FlashInternImage(channels=16, depths=(1, 2, 1, 1), groups=(1, 2, 4, 8))
    for name, _ in model.named_parameters():
        assert model.get_layer_depth(f'backbone.{name}', 'backbone.') == (
            layer_id(f'backbone.{name}', model.depths), 7), name
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (6, 7)
