# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The data command on a generated folder in the layout of v1.0-mini, against what drew it."""

from __future__ import annotations

import importlib.util
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mmdcnv4.datasets import synthetic_rig

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('mmdet3d', 'nuscenes')),
    reason='mmdet3d or the nuScenes devkit is not installed')


def run(folder, *arguments):
    command = [sys.executable, str(ROOT / 'tools/dataset_converters/nuscenes.py'), *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**os.environ, 'PYTHONPATH': str(ROOT)})


def load(path):
    return {info['token']: info for info in pickle.loads(path.read_bytes())['data_list']}


@pytest.fixture
def nuscenes(tmp_path):
    """Two scenes of two key frames, one in the training split, one in the validation split."""
    root = tmp_path / 'nus'
    synthetic_rig.write(root)
    table = root / 'v1.0-mini' / 'scene.json'
    scenes = json.loads(table.read_text())
    scenes[0]['name'] = 'scene-0061'
    table.write_text(json.dumps(scenes))
    return root


def test_info_files(nuscenes, tmp_path):
    result = run(tmp_path, 'nus', '--version', 'v1.0-mini')
    assert result.returncode == 0, result.stderr
    expected = load(nuscenes / 'synthetic_infos.pkl')
    found = [load(nuscenes / f'nuscenes_infos_{split}.pkl') for split in ('train', 'val')]
    assert [sorted(infos) for infos in found] == [
        [f'sample-{scene}-{frame}' for frame in (0, 1)] for scene in (0, 1)]
    for token, info in {**found[0], **found[1]}.items():
        own = expected[token]
        assert {key: info[key] for key in ('scene_token', 'prev', 'next')} == {
            key: own[key] for key in ('scene_token', 'prev', 'next')}
        np.testing.assert_allclose(info['ego2global'], own['ego2global'], atol=1e-9)
        for camera, image in own['images'].items():
            assert info['images'][camera]['img_path'] == image['img_path']
            for key in ('cam2img', 'lidar2cam'):
                np.testing.assert_allclose(info['images'][camera][key], image[key], atol=1e-5)
        for item, drawn in zip(info['instances'], own['instances']):
            assert item['bbox_label_3d'] == drawn['bbox_label_3d'] and item['bbox_3d_isvalid']
            np.testing.assert_allclose(item['bbox_3d'][:6], drawn['bbox_3d'][:6], atol=1e-5)
            np.testing.assert_allclose(item['velocity'], drawn['velocity'], atol=1e-4)


def test_the_data_set_reads_them(nuscenes, tmp_path):
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    import mmdcnv4.bevformer_v2  # noqa: F401
    from helpers.bevformer import TINY
    assert run(tmp_path, 'nus', '--version', 'v1.0-mini', '--out', 'infos').returncode == 0
    cfg = Config.fromfile(TINY).train_dataloader.dataset
    cfg.update(data_root=str(nuscenes), ann_file=str(tmp_path / 'infos/nuscenes_infos_train.pkl'))
    with DefaultScope.overwrite_default_scope('mmdet3d'):
        from mmdet3d.registry import DATASETS
        sample = DATASETS.build(cfg)[1]['data_samples']
    assert sample.frame_valid.tolist() == [True, True] and len(sample.gt_instances_3d) == 8


def test_refuses_a_folder_without_tables(tmp_path):
    result = run(tmp_path, 'none')
    assert result.returncode and 'none without v1.0-trainval/scene.json' in result.stderr
