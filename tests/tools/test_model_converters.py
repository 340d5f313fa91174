# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Converters of published files, on state dicts with the names that those files have."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from helpers.tool_runner import REPOSITORY, load_tool
from mmdcnv4.models.backbones import DAT, FlashInternImage, InternImage
from mmdcnv4.models.backbones.flash_intern_image import ARCH_SETTINGS, INTERN_IMAGE_SETTINGS
from mmdcnv4.models.layers import ConvHeadNeck

CONFIGS = REPOSITORY / 'configs' / 'flash_intern_image'
DINO = CONFIGS / 'dino-4scale_flash-intern-image-t_8xb4-12e_coco.py'
MASK2FORMER = CONFIGS / 'mask2former_flash-intern-image-t_8xb2-160k_ade20k-512x512.py'
SMALL = dict(channels=8, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8))
DEFORMABLE = [f'{name}.{kind}' for kind in ('weight', 'bias') for name in
              ('sampling_offsets', 'attention_weights', 'value_proj', 'output_proj')]
MULTIHEAD = ['attn.in_proj_weight', 'attn.in_proj_bias', 'attn.out_proj.weight',
             'attn.out_proj.bias']
FFN = ['layers.0.0.weight', 'layers.0.0.bias', 'layers.1.weight', 'layers.1.bias']


@pytest.fixture(scope='module')
def tool():
    return load_tool('model_converters/convert_checkpoint')


def build(path):
    pytest.importorskip('mmdet')
    cfg = Config.fromfile(path)
    pytest.importorskip(f'{cfg.default_scope}.models')
    cfg.model.backbone.update(SMALL, arch=None, init_cfg=None)
    if 'decode_head' in cfg.model:
        cfg.model.decode_head.in_channels = [8, 16, 32, 64]
    else:
        cfg.model.neck.in_channels = [16, 32, 64]
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        return MODELS.build(cfg.model).to_empty(device='cpu')  # values come from the test


def shared(model, *starts):
    """Names that are the same in old and new files, with values."""
    return {key: torch.randn(value.shape) for key, value in model.state_dict().items()
            if key.startswith(starts)}


def layer_names(prefix, index, attentions, norms):
    """Old names of one transformer layer."""
    for number, attention in enumerate(attentions):
        yield from (f'{prefix}.layers.{index}.attentions.{number}.{name}' for name in attention)
    yield from (f'{prefix}.layers.{index}.ffns.0.{name}' for name in FFN)
    yield from (f'{prefix}.layers.{index}.norms.{number}.{kind}' for number in range(norms)
                for kind in ('weight', 'bias'))


def old_dino_names():
    top = 'bbox_head.transformer'
    for index in range(6):
        yield from layer_names(f'{top}.encoder', index, [DEFORMABLE], 2)
        yield from layer_names(f'{top}.decoder', index, [MULTIHEAD, DEFORMABLE], 3)
    yield f'{top}.level_embeds'
    yield f'{top}.query_embed.weight'
    yield 'bbox_head.label_embedding.weight'
    for kind in ('weight', 'bias'):
        for name in ('enc_output', 'enc_output_norm', 'decoder.norm', 'decoder.ref_point_head.0',
                     'decoder.ref_point_head.2'):
            yield f'{top}.{name}.{kind}'


def old_mask2former_names():
    for index in range(6):
        yield from layer_names('decode_head.pixel_decoder.encoder', index, [DEFORMABLE], 2)
    for index in range(9):
        yield from layer_names('decode_head.transformer_decoder', index, [MULTIHEAD] * 2, 3)


def load_old(tool, model, names, unchanged, pairs):
    """Converts a file with `names`, loads it strictly, and checks who became what."""
    probe = tool.convert_whole_model(dict.fromkeys(names))
    own = model.state_dict()
    old = {name: torch.randn(own[new].shape) for name, new in zip(names, probe)}
    old.update(unchanged)
    result = tool.convert_whole_model({**old, 'ema_backbone_x': torch.zeros(1)})
    model.load_state_dict(result, strict=True)
    for old_name, new_name in pairs.items():
        assert torch.equal(model.state_dict()[new_name], old[old_name]), new_name


def test_dino(tool):
    model = build(DINO)
    unchanged = shared(model, 'backbone.', 'neck.', 'bbox_head.')
    top = 'bbox_head.transformer'
    load_old(tool, model, list(old_dino_names()), unchanged, {
        f'{top}.level_embeds': 'level_embed',
        f'{top}.query_embed.weight': 'query_embedding.weight',
        'bbox_head.label_embedding.weight': 'dn_query_generator.label_embedding.weight',
        f'{top}.enc_output.bias': 'memory_trans_fc.bias',
        f'{top}.enc_output_norm.bias': 'memory_trans_norm.bias',
        f'{top}.encoder.layers.5.attentions.0.value_proj.weight':
            'encoder.layers.5.self_attn.value_proj.weight',
        f'{top}.decoder.layers.3.attentions.0.attn.in_proj_weight':
            'decoder.layers.3.self_attn.attn.in_proj_weight',
        f'{top}.decoder.layers.3.attentions.1.output_proj.weight':
            'decoder.layers.3.cross_attn.output_proj.weight',
        f'{top}.decoder.layers.3.ffns.0.layers.1.bias': 'decoder.layers.3.ffn.layers.1.bias',
        f'{top}.decoder.layers.3.norms.2.bias': 'decoder.layers.3.norms.2.bias',
        f'{top}.decoder.ref_point_head.2.bias': 'decoder.ref_point_head.layers.1.bias',
        f'{top}.decoder.ref_point_head.0.bias': 'decoder.ref_point_head.layers.0.bias',
        f'{top}.decoder.norm.weight': 'decoder.norm.weight',
        'bbox_head.cls_branches.6.bias': 'bbox_head.cls_branches.6.bias'})


def test_mask2former(tool):
    model = build(MASK2FORMER)
    renamed = ('decode_head.pixel_decoder.encoder.', 'decode_head.transformer_decoder.layers.')
    unchanged = {key: value for key, value in shared(model, '').items()
                 if not key.startswith(renamed)}
    decoder = 'decode_head.transformer_decoder.layers.8'
    encoder = 'decode_head.pixel_decoder.encoder.layers.5'
    load_old(tool, model, list(old_mask2former_names()), unchanged, {
        f'{decoder}.attentions.0.attn.in_proj_weight': f'{decoder}.cross_attn.attn.in_proj_weight',
        f'{decoder}.attentions.1.attn.in_proj_weight': f'{decoder}.self_attn.attn.in_proj_weight',
        f'{decoder}.ffns.0.layers.0.0.bias': f'{decoder}.ffn.layers.0.0.bias',
        f'{decoder}.norms.1.weight': f'{decoder}.norms.1.weight',
        f'{encoder}.attentions.0.sampling_offsets.bias':
            f'{encoder}.self_attn.sampling_offsets.bias',
        f'{encoder}.ffns.0.layers.1.weight': f'{encoder}.ffn.layers.1.weight',
        'decode_head.query_feat.weight': 'decode_head.query_feat.weight'})


@pytest.mark.parametrize('method', ['mask-rcnn_flash-intern-image-t_fpn_8xb2-1x_coco',
                                    'upernet_flash-intern-image-t_8xb2-160k_ade20k-512x512'])
def test_other_models_keep_their_names(tool, tmp_path, capsys, method):
    cfg = Config.fromfile(CONFIGS / f'{method}.py')
    pytest.importorskip(f'{cfg.default_scope}.models')
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        names = list(MODELS.build(cfg.model).state_dict())
    assert list(tool.convert_whole_model(dict.fromkeys(names))) == names


class Classifier(nn.Module):
    """The attributes of mmpretrain's ImageClassifier."""

    def __init__(self):
        super().__init__()
        self.backbone = FlashInternImage(**SMALL, out_indices=(3,))
        self.neck = ConvHeadNeck(64, 96)
        self.head = nn.Module()
        self.head.fc = nn.Linear(96, 10)


def old_classifier(backbone):
    """The layout of the published classifiers: everything at the top, under `model`."""
    weights = {key: torch.randn(value.shape) for key, value in backbone.state_dict().items()}
    weights.update({'conv_head.0.weight': torch.randn(96, 64, 1, 1),
                    'conv_head.1.0.weight': torch.randn(96), 'conv_head.1.0.bias': torch.randn(96),
                    'conv_head.1.0.running_mean': torch.randn(96),
                    'conv_head.1.0.running_var': torch.rand(96) + 0.5,
                    'conv_head.1.0.num_batches_tracked': torch.tensor(7),
                    'head.weight': torch.randn(10, 96), 'head.bias': torch.randn(10)})
    return weights


def test_classifier(tool, tmp_path, capsys):
    model = Classifier().eval()
    old = old_classifier(model.backbone)
    torch.save(dict(model=old, epoch=3), tmp_path / 'old.pth')
    tool.main(['classifier', str(tmp_path / 'old.pth'), str(tmp_path / 'new.pth')])
    assert f'{len(old)} tensors, {len(old)} of them' in capsys.readouterr().out
    model.load_state_dict(torch.load(tmp_path / 'new.pth')['state_dict'], strict=True)
    feats = model.backbone(torch.randn(2, 3, 40, 56))
    (pooled,) = model.neck(feats)
    z = torch.einsum('oc,nchw->nohw', old['conv_head.0.weight'][:, :, 0, 0], feats[-1])
    def channel(name):
        return old[f'conv_head.1.0.{name}'][:, None, None]
    z = (z - channel('running_mean')) / (channel('running_var') + 1e-5).sqrt()
    z = nn.functional.gelu(z * channel('weight') + channel('bias'))
    torch.testing.assert_close(pooled, z.mean((2, 3)), rtol=1e-4, atol=1e-4)
    assert torch.equal(model.head.fc.weight, old['head.weight'])


def test_rows_of_the_head(tool, tmp_path, capsys):
    """22 rows become 5; one class has none. All else is that of the plain kind."""
    model = Classifier()
    old = old_classifier(model.backbone)
    old['head.weight'], old['head.bias'] = torch.randn(22, 96), torch.randn(22)
    source, target = tmp_path / 'old.pth', tmp_path / 'new.pth'
    torch.save(dict(model=old), source)
    command = ['classifier-22kto1k', str(source), str(target)]
    (tmp_path / 'rows.txt').write_text('3\n21\n0\n')
    tool.main([*command, '--rows', str(tmp_path / 'rows.txt')])
    new = torch.load(target)['state_dict']
    assert torch.equal(new['head.fc.weight'], old['head.weight'][[3, 21, 0]])
    assert torch.equal(new['head.fc.bias'], old['head.bias'][[3, 21, 0]])
    assert torch.equal(new['neck.conv_head.0.weight'], old['conv_head.0.weight'])

    names = [f'n{number:08d}' for number in range(22)]
    few = [names[3], 'n99999999', *names[4:22], *names[:3]] * 5  # 1 of 22, and then 1 in 110
    (tmp_path / '22k.txt').write_text('\n'.join(names))
    lists = ['--classes', str(tmp_path / '22k.txt'), str(tmp_path / '1k.txt')]
    (tmp_path / '1k.txt').write_text('\n'.join(few))
    with pytest.raises(SystemExit, match='5 of 115 are not in it'):
        tool.main([*command, *lists])
    (tmp_path / '1k.txt').write_text('\n'.join(
        [names[3], 'n99999999', *names * 5]))
    tool.main([*command, *lists])
    assert 'n99999999 not in' in capsys.readouterr().out
    head = torch.load(target)['state_dict']['head.fc.weight']
    torch.testing.assert_close(head[0], old['head.weight'][3])
    torch.testing.assert_close(head[2:24], old['head.weight'])
    torch.testing.assert_close(
        head[1], torch.cat([old['head.weight'][3:4], *[old['head.weight']] * 5]).mean(0))


@pytest.mark.parametrize('options, message', [
    ([], 'needs --rows or --classes'),
    (['--rows', 'bad.txt'], 'one number per line'), (['--rows', 'high.txt'], 'rows must be 0 to 9'),
    (['--classes', 'short.txt', 'short.txt'], 'each of the 10 rows')])
def test_wrong_rows_are_named(tool, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(model=old_classifier(Classifier().backbone)), 'old.pth')
    Path('bad.txt').write_text('1\nn02\n')
    Path('high.txt').write_text('1\n10\n')
    Path('short.txt').write_text('n1\nn2\n')
    with pytest.raises(SystemExit) as caught:
        tool.main(['classifier-22kto1k', 'old.pth', 'new.pth', *options])
    assert message in str(caught.value) + capsys.readouterr().err


def test_classifier_of_dat(tool, tmp_path):
    size = dict(channels=16, blocks=('ND', 'D', 'D', 'LD'), heads=(1, 1, 2, 2),
                groups=(1, 1, 1, 1), out_indices=(3,))
    backbone = DAT(**size)
    own = {key: torch.randn(value.shape) for key, value in backbone.state_dict().items()}
    old = {re.sub(r'^norms\.3\.', 'cls_norm.', key): value for key, value in own.items()}
    old.update({'cls_head.weight': torch.randn(10, 128), 'cls_head.bias': torch.randn(10),
                'stages.3.attns.0.relative_position_index': torch.zeros(49, 49)})
    torch.save(dict(model=old), tmp_path / 'old.pth')
    tool.main(['classifier', str(tmp_path / 'old.pth'), str(tmp_path / 'new.pth')])
    new = torch.load(tmp_path / 'new.pth')['state_dict']
    backbone.load_state_dict({key[len('backbone.'):]: value for key, value in new.items()
                              if key.startswith('backbone.')})
    assert {key for key in new if not key.startswith('backbone.')} == {
        'head.fc.weight', 'head.fc.bias'}


@pytest.mark.parametrize('arch', ['t', 'b'])
def test_flash_init(tool, tmp_path, capsys, monkeypatch, arch):
    sizes = dict(channels=16, depths=(1, 2, 1, 1), groups=(1, 2, 4, 8))
    for table in (ARCH_SETTINGS, INTERN_IMAGE_SETTINGS):
        monkeypatch.setitem(table, arch, {**table[arch], **sizes})
    source = InternImage(arch)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
    torch.save(dict(model=source.state_dict()), tmp_path / 'old.pth')
    tool.main(['flash-init', str(tmp_path / 'old.pth'), str(tmp_path / 'new.pth'), '--arch', arch])
    out = capsys.readouterr().out
    assert 'must be trained again' in out and ('offset_scale' in out) == (arch == 'b')
    target = FlashInternImage(arch)
    target.load_state_dict(torch.load(tmp_path / 'new.pth')['state_dict'], strict=True)
    old, new = (model.levels[1].blocks[1].dcn for model in (source, target))
    group, points = target.groups[1], 9
    for g in range(group):
        rows = new.offset_mask.weight[3 * points * g:3 * points * (g + 1)]
        assert torch.equal(rows[:18], old.offset.weight[18 * g:18 * (g + 1)])
        assert torch.equal(rows[18:], old.mask.weight[9 * g:9 * (g + 1)])
    assert not new.offset_mask.bias[3 * points * group:].any()
    assert torch.equal(new.value_proj.weight, old.input_proj.weight)
    if arch == 'b':
        assert torch.equal(new.offset_mask_dw.weight, old.dw_conv[0].weight)
    # offsets and raw masks are those of the source where predictors see the same input
    query = torch.randn(3, old.channels)
    packed = new.offset_mask(query)[:, :3 * points * group].unflatten(-1, (group, -1))
    torch.testing.assert_close(packed[..., :18].flatten(1), old.offset(query))
    torch.testing.assert_close(packed[..., 18:].flatten(1), old.mask(query))


def test_errors(tool, tmp_path, capsys):
    torch.save(dict(state_dict={'levels.0.x': torch.zeros(1)}), tmp_path / 'bad.pth')
    with pytest.raises(SystemExit, match='must be an InternImage'):
        tool.main(['flash-init', str(tmp_path / 'bad.pth'), str(tmp_path / 'new.pth'),
                   '--arch', 't'])
    for kind, missing in (('whole-model', r'backbone\., got'), ('classifier', r'patch_embed\., ')):
        with pytest.raises(SystemExit, match=f'{kind}: SOURCE must have keys .* {missing}'):
            tool.main([kind, str(tmp_path / 'bad.pth'), str(tmp_path / 'new.pth')])
    torch.save(dict(state_dict={'backbone.x': torch.zeros(1)}), tmp_path / 'bad.pth')
    with pytest.raises(SystemExit, match=r'missing .*unexpected'):
        tool.main(['whole-model', str(tmp_path / 'bad.pth'), str(tmp_path / 'new.pth'),
                   '--config', str(DINO)])
    with pytest.raises(SystemExit):
        tool.main(['whole-model', str(tmp_path / 'bad.pth'), str(tmp_path / 'none' / 'new.pth')])
    assert 'none/new.pth does not exist' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        tool.main(['whole-model', str(tmp_path / 'bad.pth'), str(tmp_path)])
    assert f'must be a file, got the folder {tmp_path}' in capsys.readouterr().err
    assert not (tmp_path / 'new.pth').exists()
    with pytest.raises(SystemExit):
        tool.main(['flash-init', 'a', 'b'])
    assert '--arch belongs to flash-init' in capsys.readouterr().err


def test_the_result_fits_its_config(tool, tmp_path, capsys):
    pytest.importorskip('mmseg.models')
    path = tmp_path / 'small.py'
    path.write_text(
        f"_base_ = '{CONFIGS}/upernet_flash-intern-image-t_8xb2-160k_ade20k-512x512.py'\n"
        'widths = [8, 16, 32, 64]\n'
        'model = dict(backbone=dict(arch=None, channels=8, depths=(1, 1, 1, 1), '
        'groups=(1, 2, 4, 8)), decode_head=dict(in_channels=widths, channels=8), '
        'auxiliary_head=dict(in_channels=32, channels=8))\n')
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = MODELS.build(Config.fromfile(path).model)
    old = {f'module.{key}': value for key, value in model.state_dict().items()}
    torch.save(dict(state_dict=old), tmp_path / 'old.pth')
    tool.main(['whole-model', str(tmp_path / 'old.pth'), str(tmp_path / 'new.pth'),
               '--config', str(path)])
    assert f'{len(old)} of {len(old)} tensors fit' in capsys.readouterr().out
