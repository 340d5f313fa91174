# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""One training step and one prediction of every method, on real images through its pipelines.

The images are made smaller by dividing every size in the pipelines; all else is the recipe.
"""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, DefaultScope
from zoo import SHARED_DATA, build_model, build_optimiser, leaf, read

COCO = SHARED_DATA / 'coco_sample'
ADE = dict(data_root=f'{SHARED_DATA}/ade20k_sample/', data_prefix=dict(
    img_path='images/validation', seg_map_path='annotations/validation'))
SIZES = ('scale', 'scales', 'crop_size')


def divide(sizes, factor):
    if isinstance(sizes, (list, tuple)):
        return type(sizes)(divide(size, factor) for size in sizes)
    return max(int(sizes / factor), 32)


def shrink(node, factor):
    """A pipeline with all sizes divided."""
    if isinstance(node, dict):
        return {key: divide(value, factor) if key in SIZES else shrink(value, factor)
                for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [shrink(value, factor) for value in node]
    return node


def load(cfg, loader, factor):
    """Two real images through the pipeline of `loader`."""
    if not COCO.is_dir():
        pytest.skip(f'needs the sample images in {SHARED_DATA}')
    options = Config(dict(dataset=cfg[loader].dataset))._cfg_dict.to_dict()['dataset']
    options['pipeline'] = shrink(options['pipeline'], factor)
    if cfg.default_scope == 'mmdet':
        options.update(data_root=f'{COCO}/', ann_file='annotations/instances_val2017.json',
                       data_prefix=dict(img='images/'))
    else:
        options.update(ADE)
    import_module(f'{cfg.default_scope}.datasets')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = DATASETS.build(options)
        return [dataset[0], dataset[1]]


def prepare(start):
    cfg = read(leaf(start))
    cfg.model.backbone.init_cfg = None
    preprocessor = cfg.model.get('data_preprocessor', {})
    if 'size' in preprocessor:
        preprocessor.size = divide(preprocessor.size, 4)
    if 'dino' in start:
        cfg.model.num_queries = 50  # there must be that many positions
    model = revert_sync_batchnorm(build_model(cfg))
    model.init_weights()
    return cfg, model


def check(start, factor):
    cfg, model = prepare(start)
    wrapper = build_optimiser(cfg, model)
    model.train()
    masks = {name: parameter.detach().clone() for name, parameter in model.named_parameters()
             if 'offset_mask.weight' in name}
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        logs = model.train_step(pseudo_collate(load(cfg, 'train_dataloader', factor)), wrapper)
    assert all(torch.isfinite(value).all() for value in logs.values()), logs
    moved = [name for name, parameter in model.named_parameters()
             if name in masks and not torch.equal(parameter, masks[name])]
    assert len(moved) >= len(masks) - 6, 'drop path may skip a few blocks'
    model.eval()
    with torch.no_grad(), DefaultScope.overwrite_default_scope(cfg.default_scope):
        return [result for sample in load(cfg, 'test_dataloader', factor)
                for result in model.test_step(pseudo_collate([sample]))]


@pytest.mark.parametrize('start, has_masks', [
    ('mask-rcnn_flash-intern-image-t_fpn_8xb2-3x', True),
    ('retinanet_flash-intern-image-t', False),
    ('dino-4scale_flash-intern-image-t', False),
    pytest.param('cascade-mask-rcnn_flash-intern-image-b_fpn_8xb2-1x', True,
                 marks=pytest.mark.slow)])
def test_detection(start, has_masks):
    results = check(start, 8)
    assert len(results) == 2
    for result in results:
        predictions = result.pred_instances
        assert predictions.bboxes.shape == (len(predictions.scores), 4)
        height, width = result.ori_shape
        assert ((predictions.bboxes >= -1) & (predictions.bboxes <= max(height, width) + 1)).all()
        if has_masks:
            assert predictions.masks.shape == (len(predictions.scores), height, width)


@pytest.mark.parametrize('start', ['upernet_flash-intern-image-t',
                                   'mask2former_flash-intern-image-t'])
def test_segmentation(start):
    for result in check(start, 4):
        labels = result.pred_sem_seg.data
        assert labels.shape == (1, *result.ori_shape) and 0 <= labels.min() <= labels.max() < 150


def test_classification():
    pytest.importorskip('mmpretrain')
    from mmpretrain.structures import DataSample
    cfg, model = prepare('image-classifier_flash-intern-image-t')
    wrapper = build_optimiser(cfg, model)
    samples = [DataSample().set_gt_label(label) for label in (3, 999)]
    data = dict(inputs=[torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in samples],
                data_samples=samples)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        logs = model.train_step(data, wrapper)
    assert torch.isfinite(logs['loss'])
    model.eval()
    with torch.no_grad():
        results = model.test_step(data)
    assert [result.pred_score.shape for result in results] == [(1000,), (1000,)]
