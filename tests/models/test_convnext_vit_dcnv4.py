# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""ConvNeXt and ViT with DCNv4: counts, references, weights of the plain networks, layers.

What every backbone has to do is in test_backbones_api.py.
"""

from __future__ import annotations

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn

from mmdcnv4.models.backbones import ConvNeXtDCNv4, ViTDCNv4
from mmdcnv4.models.layers import SimpleFPN
from mmdcnv4.models.layers.convnext_block import DepthwiseConv
from mmdcnv4.ops import DCNv4

CONVNEXT = dict(arch=dict(depths=(1, 1, 2, 1), channels=(16, 32, 48, 64)), group_channels=16)
VIT = dict(arch=dict(embed_dims=32, num_layers=3, num_heads=2, feedforward_channels=64),
           img_size=(32, 48), patch_size=8, group_channels=16)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def randomise(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    model.eval()
    return model


def loaded(cls, options, weights, path):
    torch.save(weights, path)
    model = cls(**options, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    return model


# with a linear layer of 1000 classes behind the last map, as the papers count
@pytest.mark.parametrize('options, count', [
    (dict(arch='b', core_op='DWConv'), 88_591_464),  # published: 89M
    (dict(arch='b', core_op='SoftmaxDWConv'), 88_591_464),
    (dict(arch='b', group_channels=16), 105_386_592), (dict(arch='b'), 96_539_376),
    (dict(arch='b', group_channels=64), 92_117_304),
    (dict(arch='b', with_pointwise=True), 117_514_224),
    (dict(arch='b', dw_kernel_size=3), 96_539_376 + 180_480),
    (dict(arch='t', core_op='DWConv'), 28_589_128), (dict(arch='s', core_op='DWConv'), 50_223_688),
    (dict(arch='l', core_op='DWConv'), 197_767_336),
    (dict(arch='xl', core_op='DWConv'), 350_196_968)])
def test_counts_of_convnext(options, count):
    with torch.device('meta'):
        model = ConvNeXtDCNv4(**options, out_indices=(3,))
    width = model.channels[-1]
    assert parameters(model) + 1000 * width + 1000 == count


@pytest.mark.parametrize('options, count', [
    (dict(group_channels=16), 84_351_400), (dict(), 78_371_656),
    (dict(group_channels=64), 75_418_696), (dict(dw_kernel_size=3), 78_463_816),
    # DeiT-B without the class token and its position
    (dict(layer_with_dcn=()), 86_567_656 - 2 * 768)])
def test_counts_of_vit(options, count):
    with torch.device('meta'):
        model = ViTDCNv4(arch='b', **options)
    assert parameters(model) + 1000 * 768 + 1000 == count


@pytest.mark.parametrize('arch, plain', [('t', 5_717_416), ('s', 22_050_664)])
def test_counts_of_the_smaller_vits(arch, plain):
    """By the difference to the published DeiT: 12 times DCNv4 for attention."""
    with torch.device('meta'):
        model = ViTDCNv4(arch=arch)
    width = model.pos_embed.shape[-1]
    predictor = -(-27 * (width // 32) // 8) * 8 * (width + 1)
    dcn, attention = predictor + 2 * (width + 1) * width, 4 * (width + 1) * width
    expected = plain - 2 * width + 12 * (dcn - attention)
    assert parameters(model) + 1000 * width + 1000 == expected


@pytest.mark.parametrize('softmax', [False, True])
def test_depthwise_convolution_against_loops(softmax):
    layer = randomise(DepthwiseConv(3, softmax)).double()
    x = torch.randn(2, 5, 9, 3, dtype=torch.double)
    weight = layer.weight.detach()
    if softmax:
        weight = weight.exp() / weight.exp().sum((2, 3), keepdim=True)
        assert weight.sum((1, 2, 3)).allclose(torch.ones(3, dtype=torch.double))
    expected = layer.bias.detach().expand_as(x).clone()
    for row in range(5):
        for column in range(9):
            for i in range(7):
                for j in range(7):
                    y, z = row + i - 3, column + j - 3
                    if 0 <= y < 5 and 0 <= z < 9:
                        expected[:, row, column] += weight[:, 0, i, j] * x[:, y, z]
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize('mask_init, kernel', [('center', 1), ('box', 3)])
def test_start_of_the_masks(mask_init, kernel):
    """The layer in the block is the identity, or the mean over 3x3 with the zeros outside."""
    model = ConvNeXtDCNv4(**CONVNEXT, mask_init=mask_init)
    model.init_weights()
    x = torch.randn(2, 16, 6, 7)
    out = model.stages[0][0].dcn(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(out, nn.functional.avg_pool2d(x, kernel, 1, kernel // 2))


@pytest.mark.parametrize('cls, options', [(ConvNeXtDCNv4, CONVNEXT), (ViTDCNv4, VIT)])
def test_initialisers_of_a_config_leave_the_predictors_alone(cls, options):
    model = cls(**options, init_cfg=dict(type='Constant', layer=['Linear', 'Conv2d'], val=0.5))
    model.init_weights()
    layers = [module for module in model.modules() if isinstance(module, DCNv4)]
    assert len(layers) in (3, 5)
    for layer in layers:
        assert not layer.offset_mask.weight.any() and not layer.offset_mask.bias.any()
        if layer.value_proj is not None:
            assert layer.value_proj.weight.std() > 0
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all((conv.weight == 0.5).all() for conv in convs)


def test_weights_of_a_plain_convnext(tmp_path):
    """A classifier: the last norm alone, and a head."""
    plain = randomise(ConvNeXtDCNv4(**CONVNEXT, core_op='DWConv', out_indices=(3,)))
    weights = {f'backbone.{key}': value for key, value in plain.state_dict().items()}
    weights['head.fc.weight'] = torch.zeros(10, 64)
    model = loaded(ConvNeXtDCNv4, CONVNEXT, dict(state_dict=weights), tmp_path / 'a.pth')
    own, source = model.state_dict(), plain.state_dict()
    fresh = [key for key in own if key not in source]
    assert all('.dcn.' in key or key[:5] in ('norm0', 'norm1', 'norm2') for key in fresh)
    assert {key for key in source if key not in own} == {
        f'stages.{stage}.{block}.depthwise_conv.{name}'
        for stage, depth in enumerate((1, 1, 2, 1)) for block in range(depth)
        for name in ('weight', 'bias')}
    assert all(torch.equal(own[key], source[key]) for key in own if key in source)
    assert not any(own[key].any() for key in own if 'offset_mask' in key)
    # its own weights, of a detector, into a classifier
    full = randomise(ConvNeXtDCNv4(**CONVNEXT), 1)
    options = dict(CONVNEXT, out_indices=(3,), gap_before_final_norm=True)
    model = loaded(ConvNeXtDCNv4, options, full.state_dict(), tmp_path / 'b.pth').eval()
    image = torch.randn(1, 3, 64, 64)
    block = full.stages[3](full.downsample_layers[3](full.stages[2](full.downsample_layers[2](
        full.stages[1](full.downsample_layers[1](full.stages[0](
            full.downsample_layers[0](image))))))))
    torch.testing.assert_close(model(image)[0], full.norm3(block.mean((1, 2))))


def test_other_leftovers_are_refused(tmp_path):
    weights = ConvNeXtDCNv4(**CONVNEXT, core_op='DWConv').state_dict()
    for key, word in (('stages.0.0.pointwise_conv1.weight', 'missing 1'),
                      ('downsample_layers.1.0.bias', 'missing 1')):
        some = {name: value for name, value in weights.items() if name != key}
        with pytest.raises(ValueError, match=word):
            loaded(ConvNeXtDCNv4, CONVNEXT, some, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match='unexpected 1'):
        loaded(ConvNeXtDCNv4, CONVNEXT, {**weights, 'extra': torch.zeros(1)}, tmp_path / 'a.pth')
    half = {key: value for key, value in ConvNeXtDCNv4(**CONVNEXT).state_dict().items()
            if 'stages.1.0.dcn' not in key}
    with pytest.raises(ValueError, match='missing 2'):  # of some blocks
        loaded(ConvNeXtDCNv4, CONVNEXT, half, tmp_path / 'a.pth')


def test_weights_of_a_plain_vit(tmp_path):
    plain = randomise(ViTDCNv4(**dict(VIT, img_size=32), layer_with_dcn=()))
    weights = dict(plain.state_dict(), cls_token=torch.ones(1, 1, 32))
    weights['pos_embed'] = torch.cat([torch.full((1, 1, 32), 9.0), weights['pos_embed']], 1)
    model = loaded(ViTDCNv4, VIT, weights, tmp_path / 'a.pth')
    own, source = model.state_dict(), plain.state_dict()
    assert {key.split('.', 2)[2].split('.')[0] for key in own if key not in source} == {'dcn'}
    assert {key.split('.', 2)[2].split('.')[0] for key in source if key not in own} == {'attn'}
    assert all(torch.equal(own[key], source[key]) for key in own
               if key in source and key != 'pos_embed')
    grid = source['pos_embed'].view(1, 4, 4, 32).permute(0, 3, 1, 2)
    resized = nn.functional.interpolate(grid, (4, 6), mode='bicubic').flatten(2).transpose(1, 2)
    torch.testing.assert_close(own['pos_embed'], resized)
    # with attention in one layer, that one is read
    mixed = loaded(ViTDCNv4, dict(VIT, img_size=32, layer_with_dcn=(0, 2)), weights,
                   tmp_path / 'a.pth')
    assert torch.equal(mixed.layers[1].attn.qkv.weight, plain.layers[1].attn.qkv.weight)


def test_vit_has_vectors_for_classification():
    vectors = randomise(ViTDCNv4(**VIT, out_type='avg_featmap'))
    maps = randomise(ViTDCNv4(**VIT))
    image = torch.randn(2, 3, 40, 33)
    (vector,), (out,) = vectors(image), maps(image)
    assert out.shape == (2, 32, 5, 5)
    torch.testing.assert_close(vector, out.mean((2, 3)))


@pytest.mark.parametrize('arch', ['t', 'b'])
def test_layers_of_convnext_are_those_of_the_task_libraries(arch):
    constructors = pytest.importorskip(
        'mmdet.engine.optimizers.layer_decay_optimizer_constructor')
    with torch.device('meta'):
        model = ConvNeXtDCNv4(arch)
    last = 12 if arch == 'b' else 6
    for name, _ in model.named_parameters():
        expected = constructors.get_layer_id_for_convnext(f'backbone.{name}', last)
        assert model.get_layer_depth(f'backbone.{name}', 'backbone.') == (expected, last + 2), name
    assert model.get_layer_depth('head.fc.weight', 'backbone.') == (last + 1, last + 2)
    assert 'ConvNeXt' in type(model).__name__  # what they look for


def test_layers_of_vit():
    from mmdcnv4.engine.optimizers.layer_decay import layer_id
    with torch.device('meta'):
        model = ViTDCNv4('t')
    for name, _ in model.named_parameters():
        layer, count = model.get_layer_depth(f'backbone.{name}', 'backbone.')
        assert count == 14 and layer == layer_id(f'backbone.{name}', model.depths)
        expected = (0 if name.startswith(('patch_embed', 'pos_embed')) else
                    13 if name.startswith('ln1') else 1 + int(name.split('.')[1]))
        assert layer == expected, name


@pytest.mark.parametrize('cls, options, text', [
    (ConvNeXtDCNv4, dict(arch='t', group_channels=64), r'group_channels must be a divisor of the '
     r'width 96 of stage 0, one of \[1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 96\], got 64'),
    (ConvNeXtDCNv4, dict(arch='huge'), 'arch must be one of'),
    (ConvNeXtDCNv4, dict(core_op='Conv'), 'core_op must be one of'),
    (ConvNeXtDCNv4, dict(kernel_size=4), 'kernel_size must be odd, got 4'),
    (ConvNeXtDCNv4, dict(stage_with_dcn=(True,)), 'stage_with_dcn must be four'),
    (ConvNeXtDCNv4, dict(mask_init='one'), 'mask_init must be a number or one of'),
    (ViTDCNv4, dict(arch='t', group_channels=36), r'divisor of the width 192, one of \[1, 2'),
    (ViTDCNv4, dict(layer_with_dcn=(12,)), r'layer_with_dcn must be numbers of layers, 0 ... 11'),
    (ViTDCNv4, dict(out_type='cls_token'), 'out_type must be one of'),
    (ViTDCNv4, dict(img_size=(224, 224, 3)), 'img_size must be a number')])
def test_bad_arguments(cls, options, text):
    with torch.device('meta'), pytest.raises(ValueError, match=text):
        cls(**options)


@pytest.mark.parametrize('name, options', [('tiny', 't'), ('xlarge', 'xl')])
def test_names_of_mmpretrain(name, options):
    with torch.device('meta'):
        assert ConvNeXtDCNv4(name).channels == ConvNeXtDCNv4(options).channels


def test_plain_networks_are_those_of_mmpretrain():
    """With their own operators, the values and the keys are those of mmpretrain's classes."""
    backbones = pytest.importorskip('mmpretrain.models.backbones')
    image = torch.randn(1, 3, 64, 80)
    theirs = randomise(backbones.ConvNeXt(
        dict(depths=[1, 1, 2, 1], channels=[16, 32, 48, 64]), out_indices=(0, 1, 2, 3),
        gap_before_final_norm=False))
    ours = ConvNeXtDCNv4(**CONVNEXT, core_op='DWConv').eval()
    ours.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-4)
    theirs = randomise(backbones.VisionTransformer(
        dict(VIT['arch']), img_size=(32, 48), patch_size=8, with_cls_token=False,
        out_type='featmap'))
    ours = ViTDCNv4(**VIT, layer_with_dcn=()).eval()
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(1, 3, 32, 48)
    torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-4)


def test_simple_fpn():
    neck = MODELS.build(dict(type='SimpleFPN', in_channels=32, out_channels=24, num_outs=5))
    assert isinstance(neck, SimpleFPN)
    neck.init_weights()
    outs = neck((torch.zeros(1), torch.randn(2, 32, 5, 7)))
    assert [tuple(out.shape) for out in outs] == [
        (2, 24, rows, columns) for rows, columns in ((20, 28), (10, 14), (5, 7), (3, 4), (2, 2))]
    assert all(out.is_contiguous() for out in outs)
    torch.testing.assert_close(outs[0].mean(1), torch.zeros(2, 20, 28), rtol=0, atol=1e-5)
    # transposed convolutions of 2x2, 1x1 and 3x3 convolutions without bias, norms
    up = (32 * 16 * 4 + 16) + 2 * 16 + (16 * 8 * 4 + 8) + (32 * 16 * 4 + 16)
    lateral = sum(width * 24 + 9 * 24 * 24 + 4 * 24 for width in (8, 16, 32, 32))
    assert parameters(neck) == up + lateral
    for options, text in ((dict(in_channels=30), 'multiple of 4'),
                          (dict(in_channels=32, num_outs=3), 'num_outs must be >= 4')):
        with pytest.raises(ValueError, match=text):
            SimpleFPN(**options)
    with pytest.raises(ValueError, match=r'\(N, 32, H, W\)'):
        neck(torch.zeros(1, 31, 4, 4))
