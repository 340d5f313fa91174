# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The steps of the README to the file for the nuScenes test server, on generated tables."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from mmengine.config import Config

from helpers.bevformer import CONFIGS, TINY
from helpers.tool_runner import TOOLS, run_command
from mmdcnv4.datasets import synthetic_rig

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('mmdet3d', 'nuscenes')),
    reason='mmdet3d or the nuScenes devkit is not installed')
NAME = 'bevformer-v2_flash-intern-image-s_offline_16xb1-24e_nus-trainval'


def small(root: Path, work: Path) -> Config:
    """The config of the README with the model and the images of the mini config."""
    cfg, mini = Config.fromfile(CONFIGS / f'{NAME}.py'), Config.fromfile(TINY)
    cfg.model, frames = mini.model, (-1, 0, 1)
    cfg.model.frames = frames
    train = cfg.train_dataloader.dataset.datasets
    for dataset in (*train, cfg.test_dataloader.dataset):
        dataset.update(data_root=f'{root}/', frames=frames)
    for dataset in train:
        dataset.pipeline = mini.train_dataloader.dataset.pipeline
    cfg.test_dataloader.dataset.pipeline = mini.test_dataloader.dataset.pipeline
    for loader in (cfg.train_dataloader, cfg.test_dataloader):
        loader.update(num_workers=0, persistent_workers=False)
    cfg.test_evaluator.update(data_root=f'{root}/', jsonfile_prefix=str(work / 'file'),
                              ann_file=f'{root}/nuscenes_infos_test.pkl')
    cfg.optim_wrapper, cfg.train_cfg.max_epochs = mini.optim_wrapper, 1
    cfg.param_scheduler = mini.param_scheduler
    return cfg


@pytest.mark.slow
def test_steps_to_the_file_for_the_test_server(tmp_path: Path) -> None:
    from nuscenes.eval.common.loaders import load_prediction
    from nuscenes.eval.detection.data_classes import DetectionBox
    root = tmp_path / 'nus'
    for version in ('v1.0-trainval', 'v1.0-test'):
        synthetic_rig.write(root, version=version)
        run_command('python', TOOLS / 'dataset_converters/nuscenes.py', root, '--version', version)
    config = tmp_path / f'{NAME}.py'
    small(root, tmp_path).dump(config)
    out = run_command('python', TOOLS / 'train.py', config, '--work-dir', tmp_path / 'work')
    assert "4/4" in out
    run_command('python', TOOLS / 'test.py', config, tmp_path / 'work/epoch_1.pth',
                '--work-dir', tmp_path / 'work')
    path = tmp_path / 'file' / 'pred_instances_3d' / 'results_nusc.json'
    boxes, meta = load_prediction(str(path), 500, DetectionBox, verbose=False)
    samples = json.loads((root / 'v1.0-test' / 'sample.json').read_text())
    assert set(boxes.sample_tokens) == {sample['token'] for sample in samples}
    assert len(samples) == 4 and len(boxes.all) > 100
    assert meta == dict(use_camera=True, use_lidar=False, use_radar=False, use_map=False,
                        use_external=False)
