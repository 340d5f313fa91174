# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The published training settings of DAT++, written down once more and compared with the configs.

Source: "DAT++: Spatially Dynamic Vision Transformer with Deformable Attention", arXiv:2309.01430,
section 4, and the settings that were published with it.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest

from helpers.zoo import build_model, build_optimiser, leaf, read


class Recipe(NamedTuple):
    """One column of the published tables."""

    start: str  # of the file name
    length: int  # epochs or iterations
    batch: int
    lr: float
    weight_decay: float
    drop_path: float
    decays_norms: bool = False


DETECTION = [
    Recipe('retinanet_dat-pp-t_fpn_32xb2-1x', 12, 64, 2e-4, 0.05, 0.0),
    Recipe('retinanet_dat-pp-t_fpn_32xb2-3x', 36, 64, 2e-4, 0.05, 0.2),
    Recipe('retinanet_dat-pp-s_fpn_32xb2-1x', 12, 64, 2e-4, 0.05, 0.1),
    Recipe('retinanet_dat-pp-s_fpn_32xb2-3x', 36, 64, 2e-4, 0.05, 0.5),
    Recipe('mask-rcnn_dat-pp-t_fpn_32xb2-1x', 12, 64, 4e-4, 0.05, 0.0),
    Recipe('mask-rcnn_dat-pp-t_fpn_32xb2-3x', 36, 64, 4e-4, 0.05, 0.3),
    Recipe('mask-rcnn_dat-pp-s_fpn_32xb2-1x', 12, 64, 4e-4, 0.05, 0.1),
    Recipe('mask-rcnn_dat-pp-s_fpn_32xb2-3x', 36, 64, 4e-4, 0.05, 0.5),
    Recipe('cascade-mask-rcnn_dat-pp-t_fpn_32xb2-1x', 12, 64, 4e-4, 0.05, 0.0),
    Recipe('cascade-mask-rcnn_dat-pp-t_fpn_32xb2-3x', 36, 64, 4e-4, 0.05, 0.1),
    Recipe('cascade-mask-rcnn_dat-pp-s', 36, 64, 4e-4, 0.05, 0.5),
    Recipe('cascade-mask-rcnn_dat-pp-b', 36, 64, 4e-4, 0.05, 0.8)]
SEGMENTATION = [
    Recipe('upernet_dat-pp-t', 160000, 16, 6e-5, 0.01, 0.3),
    Recipe('upernet_dat-pp-s', 160000, 16, 6e-5, 0.01, 0.5),
    Recipe('upernet_dat-pp-b', 160000, 16, 6e-5, 0.01, 0.7),
    Recipe('semantic-fpn_dat-pp-t', 40000, 32, 2e-4, 1e-4, 0.4, decays_norms=True),
    Recipe('semantic-fpn_dat-pp-s', 40000, 32, 2e-4, 1e-4, 0.4, decays_norms=True),
    Recipe('semantic-fpn_dat-pp-b', 40000, 32, 2e-4, 1e-4, 0.7, decays_norms=True)]
CLASSIFICATION = [
    Recipe('image-classifier_dat-pp-t', 300, 1024, 1e-3, 0.05, 0.2),
    Recipe('image-classifier_dat-pp-s', 300, 1024, 1e-3, 0.05, 0.4),
    Recipe('image-classifier_dat-pp-b_16xb64-300e', 300, 1024, 1e-3, 0.05, 0.7)]
RECIPES = DETECTION + SEGMENTATION + CLASSIFICATION
ARCHS = dict(t='dat_pp_tiny', s='dat_pp_small', b='dat_pp_base')


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda recipe: recipe.start)
def test_training_settings(recipe):
    cfg = read(leaf(recipe.start))
    assert (cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters) == recipe.length
    assert cfg.auto_scale_lr.base_batch_size == recipe.batch
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.type == 'AdamW' and optimizer.lr == pytest.approx(recipe.lr)
    assert optimizer.weight_decay == recipe.weight_decay
    assert tuple(optimizer.get('betas', (0.9, 0.999))) == (0.9, 0.999)
    clip = cfg.optim_wrapper.get('clip_grad')
    assert (clip and clip.max_norm) == (5.0 if recipe in CLASSIFICATION else None)
    backbone = cfg.model.backbone
    size = recipe.start.split('dat-pp-')[1][0]
    assert backbone.arch == ARCHS[size] and backbone.drop_path_rate == recipe.drop_path
    weights = None if recipe in CLASSIFICATION else f'checkpoints/{ARCHS[size]}_in1k_224.pth'
    assert (backbone.get('init_cfg') or {}).get('checkpoint') == weights
    assert backbone.get('with_cp', False) == (recipe not in CLASSIFICATION)


@pytest.mark.parametrize('recipe', [r for r in RECIPES if 'dat-pp-t' in r.start],
                         ids=lambda recipe: recipe.start)
def test_which_parameters_decay(recipe):
    cfg = read(leaf(recipe.start))
    model = build_model(cfg, 'meta')
    groups = {id(p): (group['lr'], group['weight_decay'])
              for group in build_optimiser(cfg, model).optimizer.param_groups
              for p in group['params']}
    exempt = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_norm = 'norm' in name or '.bn.' in name
        has_none = not recipe.decays_norms and (is_norm or name.endswith('rpe_table'))
        if recipe in CLASSIFICATION:
            has_none |= parameter.dim() == 1
        exempt += has_none
        assert groups[id(parameter)] == pytest.approx(
            (recipe.lr, 0.0 if has_none else recipe.weight_decay)), name
        if name.endswith('rpb'):  # the tables of neighbourhood attention decay
            assert groups[id(parameter)][1] == recipe.weight_decay
    assert bool(exempt) == (not recipe.decays_norms)


@pytest.mark.parametrize('recipe', DETECTION, ids=lambda recipe: recipe.start)
def test_detection(recipe):
    cfg = read(leaf(recipe.start))
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    (plain,), (first, crop, second) = steps['RandomChoice'].transforms  # 1x, too
    shorts = [(short, 1333) for short in range(480, 801, 32)]
    assert plain.scales == second.scales == shorts
    assert first.scales == [(400, 1333), (500, 1333), (600, 1333)]
    assert crop.crop_size == (384, 600) and steps['RandomFlip'].prob == 0.5
    warm_up, decay = cfg.param_scheduler
    assert (warm_up.start_factor, warm_up.end) == (0.001, 500)
    assert decay.milestones == ([8, 11] if recipe.length == 12 else [27, 33])
    neck = cfg.model.neck
    assert neck.num_outs == 5 and neck.get('norm_cfg') is None and neck.get('start_level', 0) == 0
    widths = [dict(t=64, s=96, b=128)[recipe.start.split('dat-pp-')[1][0]] * 2**stage
              for stage in range(4)]
    is_retina = recipe.start.startswith('retinanet')
    assert neck.in_channels == (widths[1:] if is_retina else widths)
    extra = None if recipe.start.startswith('cascade') else 'on_input'
    assert (neck.get('add_extra_convs') or None) == extra
    assert tuple(cfg.model.backbone.get('out_indices', (0, 1, 2, 3))) == (
        (1, 2, 3) if is_retina else (0, 1, 2, 3))
    if recipe.start.startswith('cascade'):
        for head in cfg.model.roi_head.bbox_head:
            assert head.type == 'ConvFCBBoxHead' and head.num_shared_convs == 4
            assert head.norm_cfg.type == 'SyncBN' and head.reg_decoded_bbox
            assert dict(head.loss_bbox) == dict(type='GIoULoss', loss_weight=10.0)


@pytest.mark.parametrize('recipe', SEGMENTATION, ids=lambda recipe: recipe.start)
def test_segmentation(recipe):
    cfg = read(leaf(recipe.start))
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert steps['RandomCrop'].crop_size == (512, 512)
    assert steps['RandomResize'].scale == (2048, 512)
    assert steps['RandomResize'].ratio_range == (0.5, 2.0)
    assert cfg.model.data_preprocessor.size == (512, 512)
    head = cfg.model.decode_head
    assert head.num_classes == 150 and cfg.model.get('pretrained') is None
    curve = cfg.param_scheduler[-1]
    assert (curve.type, curve.begin, curve.end, curve.eta_min) == ('PolyLR', 0, recipe.length, 0.0)
    if recipe.start.startswith('upernet'):
        assert head.channels == 512 and curve.power == 1.0
        assert cfg.model.auxiliary_head.channels == 256
        assert cfg.model.auxiliary_head.loss_decode.loss_weight == 0.4
        assert (cfg.param_scheduler[0].start_factor, cfg.param_scheduler[0].end) == (1e-6, 1500)
    else:
        assert head.type == 'FPNHead' and head.channels == 128 and head.dropout_ratio == 0.1
        assert curve.power == 0.9 and len(cfg.param_scheduler) == 1
        assert cfg.model.neck.out_channels == 256 and cfg.model.neck.num_outs == 4


@pytest.mark.parametrize('recipe', CLASSIFICATION, ids=lambda recipe: recipe.start)
def test_classification(recipe):
    cfg = read(leaf(recipe.start))
    train = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    test = {step.type: step for step in cfg.test_dataloader.dataset.pipeline}
    assert test['ResizeEdge'].scale == 256 and test['CenterCrop'].crop_size == 224
    assert (train['RandAugment'].magnitude_level, train['RandAugment'].magnitude_std) == (9, 0.5)
    assert train['RandomErasing'].erase_prob == 0.25
    assert [a.alpha for a in cfg.model.train_cfg.augments] == [0.8, 1.0]
    assert cfg.model.head.loss.label_smooth_val == 0.1 and not cfg.get('custom_hooks')
    warm_up, curve = cfg.param_scheduler
    # 5e-7 and 5e-6 for 512 images
    assert recipe.lr * warm_up.start_factor == pytest.approx(1e-6) and warm_up.end == 20
    assert curve.eta_min == pytest.approx(1e-5) and curve.begin == 0


def test_fine_tuning_at_384():
    cfg = read(leaf('image-classifier_dat-pp-b_16xb24-30e'))
    train = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    assert train['RandomResizedCrop'].scale == 384
    assert [step.type for step in cfg.test_dataloader.dataset.pipeline] == [
        'LoadImageFromFile', 'Resize', 'PackInputs']  # no crop
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (384, 384)
    assert cfg.train_cfg.max_epochs == 30 and cfg.auto_scale_lr.base_batch_size == 384
    optimizer = cfg.optim_wrapper.optimizer
    assert optimizer.lr * 512 / 384 == pytest.approx(2e-5) and optimizer.weight_decay == 1e-8
    (curve,) = cfg.param_scheduler
    assert curve.eta_min * 512 / 384 == pytest.approx(2e-7) and curve.begin == 0
    assert cfg.model.backbone.drop_path_rate == 0.6
    assert cfg.model.backbone.get('img_size', 224) == 224  # the tables are stretched


@pytest.mark.parametrize('schedule', ['1x', '3x'])
def test_the_first_version_has_the_settings_of_the_second(schedule):
    first, second = (
        read(leaf(f'cascade-mask-rcnn_{arch}_fpn_32xb2-{schedule}'))._cfg_dict.to_dict()
        for arch in ('dat-t', 'dat-pp-t'))
    for cfg, arch in ((first, 'dat_tiny'), (second, 'dat_pp_tiny')):
        assert cfg['model']['backbone'].pop('arch') == arch
        for part in (cfg['model']['backbone'].pop('init_cfg'), cfg.pop('dat')['init_cfg']):
            assert part['checkpoint'] == f'checkpoints/{arch}_in1k_224.pth'
    assert first['model']['neck'].pop('in_channels') == first.pop('widths')
    assert second['model']['neck'].pop('in_channels') == second.pop('widths')
    assert first == second
