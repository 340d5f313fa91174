# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A real key frame of nuScenes through data set, projection, losses and predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from places import CONFIGS

FOLDER = Path(__file__).parents[3] / 'shared' / 'data' / 'nuscenes_sample'
INFOS = sorted(FOLDER.glob('*.pkl')) if FOLDER.is_dir() else []
pytestmark = pytest.mark.skipif(not INFOS, reason=f'there is no nuScenes key frame in {FOLDER}')


@pytest.fixture
def cfg():
    """ResNet-50, one frame, at a quarter of the resolution and on a coarse plane."""
    cfg = Config.fromfile(CONFIGS / 'bevformer-v2_r50_t1-base_16xb1-24e_nus.py')
    small = dict(bev_size=(30, 30))
    cfg.merge_from_dict(dict(model=dict(
        img_backbone=dict(init_cfg=None), bev_encoder=dict(num_layers=1, **small),
        bev_head=dict(num_layers=1, num_queries=80, **small))))
    for step in cfg.train_dataloader.dataset.pipeline:
        if step.type == 'MultiViewCropResize':
            step.heights = (160,)
    cfg.train_dataloader.dataset.update(
        data_root=str(FOLDER), ann_file=INFOS[0].name,
        data_prefix={key: '' for key in cfg.train_dataloader.dataset.data_prefix})
    return cfg


@pytest.fixture
def dataset(cfg):
    from mmdet3d.registry import DATASETS
    return DATASETS.build(cfg.train_dataloader.dataset)


def test_projected_centres(dataset):
    """Of every annotation that a camera has too: less than a pixel apart in the full image."""
    info = dataset.get_data_info(0)
    centers = np.array([item['bbox_3d'][:3] for item in info['instances']])
    assert len(centers) == 69
    worst, count = 0.0, 0
    for camera, view in info['images'].items():
        camera_centers = centers @ np.array(view['lidar2cam'])[:3, :3].T
        camera_centers = camera_centers + np.array(view['lidar2cam'])[:3, 3]
        pixels = camera_centers @ np.array(view['cam2img']).T
        pixels = pixels[:, :2] / pixels[:, 2:]
        for item in info['cam_instances'][camera]:
            apart = np.linalg.norm(camera_centers - item['bbox_3d'][:3], axis=1)
            row = apart.argmin()
            assert apart[row] < 0.05
            worst = max(worst, np.abs(pixels[row] - item['center_2d']).max())
            count += 1
    assert count == 84 and worst < 1


def test_perspective_targets(dataset):
    sample = dataset[0]['data_samples']
    target, info = sample.gt_mono, dataset.get_data_info(0)
    assert len(target) >= 20 and set(target.cam_idx.tolist()) >= {0, 1, 3}
    crop, scale = np.array([0, 260]), 0.25
    for row in range(len(target)):
        camera = sample.cameras[int(target.cam_idx[row])]
        pixels = np.array([item['center_2d'] for item in info['cam_instances'][camera]])
        apart = np.abs((pixels - crop) * scale - target.centers_2d[row].numpy()).max(1)
        assert apart.min() < 0.25
    cars = target.labels == 3
    assert cars.any() and (target.attrs[cars] < 3).all()
    assert ((target.sizes_wlh[cars] > 1) & (target.sizes_wlh[cars] < 7)).all()


def test_losses_and_predictions(cfg, dataset):
    from mmdet3d.registry import MODELS
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(cfg.model)).train()
    sample = dataset[0]
    assert sample['inputs']['img'].shape == (6, 3, 160, 400)
    data = model.data_preprocessor(pseudo_collate([sample]), True)
    assert data['inputs']['imgs'].shape == (1, 6, 3, 160, 416)
    losses = model(data['inputs'], data['data_samples'], mode='loss')
    assert all(value.isfinite() for value in losses.values())
    assert losses['mono_loss_box3d_depth'] > 0 and losses['loss_bbox'] > 0
    result = model.eval().test_step(pseudo_collate([sample]))[0].pred_instances_3d
    assert len(result) == 300 and result.bboxes_3d.tensor.isfinite().all()
