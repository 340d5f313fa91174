# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The published training settings, written down here once more and compared with the configs.

Source: the recipes of "Efficient Deformable ConvNets", arXiv:2401.06197, appendix, and the
configuration files that were published with it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Optional

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, HOOKS, MODELS, DefaultScope

from helpers.zoo import build_model, leaf, read

K1, K22 = '1k_224', '22k_384'
DEPTHS = dict(t=(4, 4, 18, 4), s=(4, 4, 21, 4), b=(4, 4, 21, 4), l=(5, 5, 22, 5))


@dataclass(frozen=True)
class Recipe:
    """One column of the published tables; None is no clipping, and no layer decay."""

    start: str  # of the file name
    length: int  # epochs or iterations
    batch: int
    lr: float
    drop_path: float
    with_cp: bool
    rate: Optional[float] = 1.0
    offset: float = 1.0
    weight_decay: float = 0.05
    clip: Optional[float] = None
    weights: Optional[str] = K1


def named(method, size, rest=''):
    return f'{method}_flash-intern-image-{size}_{rest}'


RECIPES = [
    Recipe(named('mask-rcnn', 't', 'fpn_8xb2-1x'), 12, 16, 1e-4, 0.2, True),
    Recipe(named('mask-rcnn', 't', 'fpn_8xb2-3x'), 36, 16, 1e-4, 0.2, True),
    Recipe(named('mask-rcnn', 's', 'fpn_8xb2-1x'), 12, 16, 1e-4, 0.3, True),
    Recipe(named('mask-rcnn', 's', 'fpn_8xb8-3x'), 36, 64, 2e-4, 0.4, True),
    Recipe(named('mask-rcnn', 'b', 'fpn_8xb2-1x'), 12, 16, 1e-4, 0.3, True),
    Recipe(named('mask-rcnn', 'b', 'fpn_16xb4-3x'), 36, 64, 2e-4, 0.4, True, 0.9, 0.01),
    Recipe(named('cascade-mask-rcnn', 'l', 'fpn_8xb2-1x'), 12, 16, 1e-4, 0.4, False, 0.94,
           weights=K22),
    Recipe(named('cascade-mask-rcnn', 'l', 'fpn_16xb4-3x'), 36, 64, 2e-4, 0.4, True, 0.9, 0.01,
           weights=K22),
    Recipe(named('dino-4scale', 't'), 12, 32, 2e-4, 0.2, True, 0.9, 1.0, 1e-4, 0.1),
    Recipe(named('dino-4scale', 's'), 12, 32, 2e-4, 0.3, True, 0.9, 1.0, 1e-4, 0.1),
    Recipe(named('dino-4scale', 'b'), 12, 32, 2e-4, 0.3, True, 0.9, 1.0, 1e-4, 0.1),
    Recipe(named('dino-4scale', 'l'), 12, 16, 1e-4, 0.4, True, None, 1.0, 0.05, 0.1, K22),
    Recipe(named('upernet', 't'), 160000, 16, 6e-5, 0.2, True),
    Recipe(named('upernet', 's'), 160000, 16, 6e-5, 0.3, True),
    Recipe(named('upernet', 'b'), 160000, 16, 6e-5, 0.3, False),
    Recipe(named('upernet', 'l'), 160000, 16, 2e-5, 0.4, False, 0.94, clip=0.1, weights=K22),
    Recipe(named('mask2former', 't'), 160000, 16, 1e-4, 0.2, False, 0.9, clip=0.01),
    Recipe(named('mask2former', 's'), 160000, 16, 1e-4, 0.3, False, 1.0, clip=0.1),
    Recipe(named('mask2former', 'b'), 160000, 16, 1e-4, 0.4, False, 1.0, clip=0.1),
    Recipe(named('mask2former', 'l'), 160000, 16, 1e-4, 0.5, True, 0.94, clip=0.1, weights=K22),
    Recipe(named('image-classifier', 't'), 300, 1024, 1e-3, 0.1, False, None, clip=5.0,
           weights=None),
    Recipe(named('image-classifier', 's'), 300, 1024, 1e-3, 0.4, False, None, clip=5.0,
           weights=None),
    Recipe(named('image-classifier', 'b'), 300, 1024, 1e-3, 0.5, False, None, clip=5.0,
           weights=None),
    Recipe(named('image-classifier', 'l'), 20, 512, 2e-5, 0.1, False, 0.9, 0.1, clip=5.0,
           weights=None),
]
DETECTION = ('mask-rcnn', 'cascade', 'dino', 'retinanet')


def size_of(recipe):
    return recipe.start.split('flash-intern-image-')[1][0]


def transforms(pipeline):
    return {step.type: step for step in pipeline}


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda recipe: recipe.start)
def test_training_settings(recipe):
    cfg = read(leaf(recipe.start))
    length = cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters
    assert length == recipe.length
    assert cfg.auto_scale_lr.base_batch_size == recipe.batch
    optim = cfg.optim_wrapper
    assert optim.get('type', 'OptimWrapper') == 'OptimWrapper'  # single precision
    assert optim.optimizer.type == 'AdamW'
    assert optim.optimizer.lr == pytest.approx(recipe.lr)
    assert optim.optimizer.weight_decay == recipe.weight_decay
    assert tuple(optim.optimizer.get('betas', (0.9, 0.999))) == (0.9, 0.999)
    clip = optim.get('clip_grad')
    assert (clip and clip.max_norm) == recipe.clip and (clip or {}).get('norm_type', 2) == 2
    if recipe.rate is None:
        assert optim.get('constructor', 'DefaultOptimWrapperConstructor') \
            == 'DefaultOptimWrapperConstructor'
    else:
        assert optim.constructor == 'CustomLayerDecayOptimizerConstructor'
        assert optim.paramwise_cfg.layer_decay_rate == recipe.rate
        if not recipe.start.startswith('image'):  # there by a key, see test_learning_rates.py
            assert optim.paramwise_cfg.get('offset_lr_scale', 1.0) == recipe.offset


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda recipe: recipe.start)
def test_backbone(recipe):
    cfg = read(leaf(recipe.start))
    backbone = build_model(cfg, 'meta').backbone
    rates = [block.drop_path.drop_prob for level in backbone.levels for block in level.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(recipe.drop_path)
    assert backbone.depths == DEPTHS[size_of(recipe)]
    blocks = [block for level in backbone.levels for block in level.blocks]
    assert {block.with_cp for block in blocks} == {recipe.with_cp}
    is_classifier = recipe.start.startswith('image')
    scale = (None if size_of(recipe) == 't' else 1e-5) if is_classifier else 1.0
    assert {block.layer_scale for block in blocks} == {scale}
    init_cfg = cfg.model.backbone.get('init_cfg')
    if recipe.weights is None:
        assert init_cfg is None
    else:
        assert init_cfg.checkpoint == (f'checkpoints/flash_intern_image_{size_of(recipe)}_'
                                       f'{recipe.weights}.pth')


@pytest.mark.parametrize('start', [r.start for r in RECIPES if r.start.startswith(DETECTION)])
def test_detection(start):
    cfg = read(leaf(start))
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.mean == [123.675, 116.28, 103.53] and preprocessor.pad_size_divisor == 32
    assert preprocessor.std == [58.395, 57.12, 57.375] and preprocessor.bgr_to_rgb
    assert preprocessor.get('pad_mask', False) == ('mask-rcnn' in start)
    test = transforms(cfg.test_dataloader.dataset.pipeline)
    assert test['Resize'].scale == (1333, 800) and test['Resize'].keep_ratio
    assert cfg.default_hooks.checkpoint.interval == 1
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == 2  # see det-runtime.py
    assert cfg.default_hooks.checkpoint.save_best == 'auto'
    train = cfg.train_dataloader.dataset
    assert train.filter_cfg.filter_empty_gt
    steps = transforms(train.pipeline)
    assert steps['RandomFlip'].prob == 0.5
    if '-1x' in start:
        assert steps['Resize'].scale == (1333, 800) and steps['Resize'].keep_ratio
        return
    (plain,), (first, crop, second) = steps['RandomChoice'].transforms
    assert plain.scales == second.scales == [
        (480, 1333), (512, 1333), (544, 1333), (576, 1333), (608, 1333), (640, 1333), (672, 1333),
        (704, 1333), (736, 1333), (768, 1333), (800, 1333)]
    longest = 4200 if start.startswith('dino') else 1333
    assert first.scales == [(400, longest), (500, longest), (600, longest)]
    assert (crop.crop_type, crop.crop_size) == ('absolute_range', (384, 600))
    assert crop.allow_negative_crop == (not start.startswith('dino'))


@pytest.mark.parametrize('start', [r.start for r in RECIPES if 'mask-rcnn' in r.start])
def test_neck_has_layer_norm(start):
    neck = build_model(read(leaf(start)), 'meta').neck
    names = [name for name, _ in neck.named_parameters()]
    assert 'lateral_convs.0.ln.weight' in names and 'fpn_convs.3.ln.bias' in names
    assert 'fpn_convs.0.conv.bias' not in names


@pytest.mark.parametrize('schedule', ['8xb2-1x', '16xb4-3x'])
def test_cascade_heads(schedule):
    cfg = read(leaf(named('cascade-mask-rcnn', 'l', f'fpn_{schedule}')))
    stds = [0.1, 0.1, 0.2, 0.2], [0.05, 0.05, 0.1, 0.1], [0.033, 0.033, 0.067, 0.067]
    assert cfg.model.roi_head.stage_loss_weights == [1, 0.5, 0.25]
    for head, target_stds in zip(cfg.model.roi_head.bbox_head, stds):
        assert head.type == 'ConvFCBBoxHead' and head.norm_cfg.type == 'SyncBN'
        assert (head.num_shared_convs, head.num_shared_fcs) == (4, 1)
        assert (head.conv_out_channels, head.fc_out_channels) == (256, 1024)
        assert not head.reg_class_agnostic and head.reg_decoded_bbox
        assert head.bbox_coder.target_stds == target_stds
        assert dict(head.loss_bbox) == dict(type='GIoULoss', loss_weight=10.0)


def test_cascade_3x_averages_weights():
    cfg = read(leaf(named('cascade-mask-rcnn', 'l', 'fpn_16xb4-3x')))
    assert not read(leaf(named('cascade-mask-rcnn', 'l', 'fpn_8xb2-1x'))).get('custom_hooks')
    options = dict(cfg.custom_hooks[0])
    assert options.pop('priority') == 49
    build_model(cfg, 'meta')  # registers mmdet's classes
    with DefaultScope.overwrite_default_scope('mmdet'):
        hook = HOOKS.build(options)
        model = torch.nn.Linear(1, 1, bias=False)
        average = MODELS.build(hook.ema_cfg, default_args=dict(model=model))
    average.update_parameters(model)  # the first call copies
    expected = model.weight.item()
    for step in range(1, 4):
        model.weight.data.add_(1.0)
        average.update_parameters(model)
        momentum = (1 - 1e-4) * math.exp(-(1 + step) / 2000) + 1e-4
        expected += momentum * (model.weight.item() - expected)
        assert average.module.weight.item() == pytest.approx(expected)


@pytest.mark.parametrize('size', 'tsbl')
def test_dino(size):
    model = read(leaf(named('dino-4scale', size))).model
    assert model.backbone.out_indices == (1, 2, 3)
    assert (model.neck.out_channels, model.neck.kernel_size, model.neck.num_outs) == (256, 1, 4)
    assert dict(model.neck.norm_cfg) == dict(type='GN', num_groups=32)
    assert model.num_queries == 900 and model.as_two_stage and model.with_box_refine
    assert (model.dn_cfg.label_noise_scale, model.dn_cfg.box_noise_scale,
            model.dn_cfg.group_cfg.num_dn_queries) == (0.5, 1.0, 100)
    assert model.positional_encoding.temperature == 20 and model.test_cfg.max_per_img == 300
    head = model.bbox_head
    assert (head.loss_cls.gamma, head.loss_cls.alpha, head.loss_cls.loss_weight) == (2, 0.25, 1)
    assert (head.loss_bbox.loss_weight, head.loss_iou.loss_weight) == (5, 2)
    assert [cost.weight for cost in model.train_cfg.assigner.match_costs] == [2, 5, 2]


SEGMENTATION = [('upernet', 't', 512, 256), ('upernet', 's', 512, 320), ('upernet', 'b', 512, 448),
                ('upernet', 'l', 640, 640), ('mask2former', 't', 512, None),
                ('mask2former', 's', 640, None), ('mask2former', 'b', 640, None),
                ('mask2former', 'l', 640, None)]


@pytest.mark.parametrize('method, size, crop, auxiliary', SEGMENTATION)
def test_segmentation(method, size, crop, auxiliary):
    cfg = read(leaf(named(method, size)))
    scale = {512: (2048, 512), 640: (2560, 640)}[crop]
    train = cfg.train_dataloader.dataset.pipeline
    assert [step.type for step in train] == [
        'LoadImageFromFile', 'LoadAnnotations', 'RandomResize', 'RandomCrop', 'RandomFlip',
        'PhotoMetricDistortion', 'PackSegInputs']
    steps = transforms(train)
    assert steps['LoadAnnotations'].reduce_zero_label
    assert steps['RandomResize'].scale == scale and steps['RandomResize'].keep_ratio
    assert steps['RandomResize'].ratio_range == (0.5, 2.0)
    assert steps['RandomCrop'].crop_size == (crop, crop)
    assert steps['RandomCrop'].cat_max_ratio == 0.75
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.size == (crop, crop) and preprocessor.seg_pad_val == 255
    assert preprocessor.get('test_cfg') is None  # no padding in the test
    assert cfg.model.test_cfg.mode == 'whole'
    test = [step.type for step in cfg.test_dataloader.dataset.pipeline]
    is_plain = (method, size) == ('upernet', 't')
    assert ('ResizeToMultiple' in test) == (not is_plain)
    assert transforms(cfg.test_dataloader.dataset.pipeline)['Resize'].scale == scale
    assert cfg.default_hooks.checkpoint.save_best == 'mIoU'
    every = 16000 if method == 'upernet' else 2000 if size == 'l' else 5000
    assert cfg.train_cfg.val_interval == cfg.default_hooks.checkpoint.interval == every
    if method == 'upernet':
        assert cfg.model.auxiliary_head.in_channels == auxiliary
        assert cfg.model.auxiliary_head.loss_decode.loss_weight == 0.4
        assert cfg.model.decode_head.channels == 512
        assert cfg.model.decode_head.norm_cfg.type == 'SyncBN'


@pytest.mark.parametrize('method, size, crop, auxiliary', SEGMENTATION)
def test_multi_scale_test(method, size, crop, auxiliary):
    pipeline = read(leaf(named(method, size))).tta_pipeline
    lists = pipeline[1].transforms
    ratios = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75) if crop == 512 else (0.75, 1.0, 1.25)
    assert [step.scale for step in lists[0]] == [
        (int(crop * 4 * ratio), int(crop * ratio)) for ratio in ratios]
    flips = next(steps for steps in lists if steps[0].type == 'RandomFlip')
    assert [flip.prob for flip in flips] == [0, 1]


@pytest.mark.parametrize('size, queries, width', [('t', 100, 1024), ('s', 200, 2048),
                                                  ('b', 200, 2048), ('l', 200, 2048)])
def test_mask2former_head(size, queries, width):
    head = read(leaf(named('mask2former', size))).model.decode_head
    assert head.num_queries == queries and head.num_classes == 150
    layer = head.pixel_decoder.encoder.layer_cfg
    assert layer.ffn_cfg.feedforward_channels == width
    assert (layer.self_attn_cfg.num_levels, layer.self_attn_cfg.num_points,
            layer.self_attn_cfg.num_heads, head.pixel_decoder.encoder.num_layers) == (3, 4, 8, 6)
    assert head.transformer_decoder.num_layers == 9
    assert head.transformer_decoder.layer_cfg.ffn_cfg.feedforward_channels == 2048
    assert (head.loss_cls.loss_weight, head.loss_mask.loss_weight,
            head.loss_dice.loss_weight) == (2, 5, 5)
    assert [cost.weight for cost in head.train_cfg.assigner.match_costs] == [2, 5, 5]


@pytest.mark.parametrize('size, pixels, smoothing', [('t', 224, 0.1), ('s', 224, 0.1),
                                                     ('b', 224, 0.1), ('l', 384, 0.3)])
def test_classifier(size, pixels, smoothing):
    cfg = read(leaf(named('image-classifier', size)))
    assert cfg.model.head.loss.label_smooth_val == smoothing
    train = transforms(cfg.train_dataloader.dataset.pipeline)
    test = transforms(cfg.test_dataloader.dataset.pipeline)
    assert train['RandomResizedCrop'].scale == pixels
    assert test['ResizeEdge'].scale == test['CenterCrop'].crop_size == pixels
    assert test['ResizeEdge'].interpolation == 'bicubic'
    augment = train['RandAugment']
    assert (augment.magnitude_level, augment.magnitude_std, augment.num_policies) == (9, 0.5, 2)
    assert cfg.custom_hooks[0].type == 'EMAHook' and cfg.custom_hooks[0].momentum == 1e-4
    assert cfg.custom_hooks[0].update_buffers
    if size == 'l':
        assert cfg.load_from == 'checkpoints/flash-intern-image-l_22kto1k-rows.pth'
        assert cfg.model.train_cfg is None and 'RandomErasing' not in train
    else:
        assert [a.alpha for a in cfg.model.train_cfg.augments] == [0.8, 1.0]
        assert train['RandomErasing'].erase_prob == 0.25


@pytest.mark.parametrize('method, size', [('mask-rcnn', 't'), ('upernet', 's')])
def test_pipelines_build(method, size):
    rest = 'fpn_8xb2-3x' if method == 'mask-rcnn' else ''
    cfg = Config(read(leaf(named(method, size, rest)))._cfg_dict.to_dict())
    pytest.importorskip(f'{cfg.default_scope}.datasets')
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            dataset = DATASETS.build(dict(loader.dataset, lazy_init=True))
        assert len(dataset.pipeline.transforms) == len(loader.dataset.pipeline)
