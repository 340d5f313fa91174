# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Configs that inherit `mmdcnv4::...`, in every program of mmengine and the task libraries."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hub import get_config, get_model
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner

import mmdcnv4  # noqa: F401  registers the scope
from helpers.zoo import CONFIGS, LEAVES
from mmdcnv4.datasets.drawn_scenes import write_drawn_scenes

DETECTION = 'quick_start/mask-rcnn_flash-intern-image-mini_fpn_1xb2-6e_drawn-scenes-160x160.py'
SEGMENTATION = 'quick_start/upernet_flash-intern-image-mini_1xb4-2k_drawn-scenes-160x160.py'


@pytest.fixture(autouse=True)
def _no_scope(monkeypatch):
    """As in a fresh process: what other tests left is put aside."""
    monkeypatch.setattr(DefaultScope, '_instance_dict', type(DefaultScope._instance_dict)())


@pytest.fixture(scope='module')
def scenes(tmp_path_factory):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    return write_drawn_scenes(tmp_path_factory.mktemp('drawn') / 'scenes', 4, 2)


@pytest.fixture(params=[DETECTION, SEGMENTATION], ids=['mmdet', 'mmseg'])
def inherited(request, scenes, tmp_path):
    """A config outside the repository, on a few images; (file, config)."""
    original = Config.fromfile(CONFIGS / request.param)
    old = original.train_dataloader.dataset.data_root
    new = f'{scenes}/{"coco" if request.param == DETECTION else "ade"}/'
    file = tmp_path / 'mine.py'
    lines = [f"_base_ = 'mmdcnv4::{request.param}'", f'work_dir = {str(tmp_path / "work")!r}']
    lines += [f'{loader}_dataloader = dict(num_workers=0, persistent_workers=False, '
              f'dataset=dict(data_root={new!r}))' for loader in ('train', 'val', 'test')]
    if request.param == DETECTION:
        ann_file = original.val_evaluator.ann_file.replace(old, new)
        lines += [f'{name}_evaluator = dict(ann_file={ann_file!r})' for name in ('val', 'test')]
    file.write_text('\n'.join(lines))
    return file, Config.fromfile(file)


def module_names(model):
    return [(name, type(module)) for name, module in model.named_modules()]


def test_runner(inherited):
    file, cfg = inherited
    runner = Runner.from_cfg(cfg)
    batch = next(iter(runner.build_dataloader(cfg.train_dataloader)))
    sample = runner.model.data_preprocessor(batch, training=True)
    losses = runner.model(**sample, mode='loss')
    assert all(torch.as_tensor(value).isfinite().all() for name, value in losses.items()
               if 'loss' in name and not isinstance(value, list))
    if cfg.default_scope == 'mmdet':  # mmcv has a LoadAnnotations, too, which knows no masks
        assert sample['data_samples'][0].gt_instances.masks is not None


def test_data_set(inherited):
    _, cfg = inherited
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = DATASETS.build(cfg.val_dataloader.dataset)
    assert len(dataset) == 2
    assert type(dataset).__module__.split('.')[0] in (cfg.default_scope, 'mmengine')
    expected = cfg.default_scope
    names = {type(step).__module__.split('.')[0] for step in dataset.pipeline.transforms}
    assert expected in names


def test_without_a_scope_an_ambiguous_name_is_refused(inherited):
    """`LoadAnnotations` is a class of several libraries: none is taken by chance."""
    from mmdcnv4 import registry
    transforms = next(item for item in registry.REGISTRIES if item.name == 'transform')
    with pytest.raises(KeyError, match='LoadAnnotations is a class of mmdet, mmseg.*default_scope'):
        transforms.get('LoadAnnotations')
    assert transforms.get('NoSuchTransform') is None
    with DefaultScope.overwrite_default_scope('mmseg'), \
            DefaultScope.overwrite_default_scope('mmdcnv4'):
        assert transforms.get('LoadAnnotations').__module__.startswith('mmseg.')


def test_the_model_is_the_same_as_from_the_repository(inherited, request):
    _, cfg = inherited
    name = DETECTION if cfg.default_scope == 'mmdet' else SEGMENTATION
    direct = Config.fromfile(CONFIGS / name)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device('meta'):
        assert module_names(MODELS.build(cfg.model)) == module_names(MODELS.build(direct.model))


def test_init_and_inferencer(inherited, tmp_path):
    file, cfg = inherited
    image = tmp_path / 'image.png'
    cv2.imwrite(str(image), np.zeros((160, 160, 3), np.uint8))
    if cfg.default_scope == 'mmdet':
        from mmdet.apis import DetInferencer, inference_detector, init_detector
        model = init_detector(str(file), device='cpu')
        assert inference_detector(model, str(image)).pred_instances.masks is not None
        torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=model.dataset_meta)),
                   tmp_path / 'a.pth')
        found = DetInferencer(str(file), str(tmp_path / 'a.pth'), device='cpu',
                              show_progress=False)(str(image))
        assert set(found['predictions'][0]) >= {'labels', 'scores', 'bboxes'}
    else:
        from mmseg.apis import MMSegInferencer, inference_model, init_model
        model = init_model(str(file), device='cpu')
        assert inference_model(model, str(image)).pred_sem_seg.data.shape[1:] == (160, 160)
        torch.save(dict(state_dict=model.state_dict(), meta=dict(dataset_meta=dict(
            classes=cfg.train_dataloader.dataset.metainfo.classes, palette=None))),
            tmp_path / 'a.pth')
        found = MMSegInferencer(str(file), str(tmp_path / 'a.pth'), device='cpu',
                                classes=['a'] * 6, palette=[[0, 0, 0]] * 6)(str(image))
        assert found['predictions'].shape == (160, 160)


HUB = [name for name in LEAVES if 'image-classifier' not in name and (
    name.startswith('quick_start') or '-t_' in name or 'mini' in name or '_t1_' in name)]
# of every folder and library one by default: what differs is the inheritance, not the size
FIRST = {(name.split('/')[0], name.split('/')[1].startswith('upernet')): name
         for name in reversed(HUB)}


@pytest.mark.parametrize('name', [
    name if name in FIRST.values() else pytest.param(name, marks=pytest.mark.slow)
    for name in HUB])
def test_hub(name):
    """`get_model` names no library: the detector says whose parts the others are."""
    pytest.importorskip('mmdet3d')
    cfg = get_config(f'mmdcnv4::{name}')
    with torch.device('meta'):
        model = get_model(f'mmdcnv4::{name}')
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            assert module_names(model) == module_names(MODELS.build(cfg.model))
