# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The metric of nuScenes on the synthetic rig."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.config import Config
from mmengine.structures import InstanceData

from helpers.bevformer import TINY
from mmdcnv4.datasets import synthetic_rig

PREFIX = 'NuScenes metric/pred_instances_3d_NuScenes'


@pytest.fixture
def two_by_two(tmp_path):
    """The dataset that the tiny config is for."""
    synthetic_rig.write(tmp_path / 'rig')
    return tmp_path / 'rig'


def tiny_config(root):
    cfg = Config.fromfile(TINY)
    text = cfg.pretty_text.replace('data/synthetic-rig/', f'{root}/')
    return Config.fromstring(text, '.py')


def score(cfg, dataset, predictions):
    """The devkit's numbers for one InstanceData per sample."""
    from mmdet3d.registry import METRICS
    pytest.importorskip('nuscenes', reason='the nuScenes devkit is not installed')
    metric = METRICS.build(copy.deepcopy(cfg.val_evaluator))
    metric.dataset_meta = dataset.metainfo
    for index, prediction in enumerate(predictions):
        metric.process({}, [dict(pred_instances_3d=prediction.to_dict(), pred_instances={},
                                 sample_idx=index)])
    return metric.evaluate(len(predictions))


def truth_of(info):
    rows = [[*item['bbox_3d'], *item['velocity']] for item in info['instances']]
    boxes = LiDARInstance3DBoxes(torch.tensor(rows), box_dim=9, origin=(0.5, 0.5, 0.5))
    labels = [info['label_mapping'][item['bbox_label_3d']] for item in info['instances']]
    return InstanceData(bboxes_3d=boxes, labels_3d=torch.tensor(labels),
                        scores_3d=torch.full((len(rows),), 0.9))


def test_truth_scores_perfectly(two_by_two):
    from mmdet3d.registry import DATASETS
    cfg = tiny_config(two_by_two)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    truth = [truth_of(dataset.get_data_info(index)) for index in range(len(dataset))]
    result = score(cfg, dataset, truth)
    assert result[f'{PREFIX}/mAP'] == pytest.approx(1, abs=1e-3)
    assert result[f'{PREFIX}/NDS'] == pytest.approx(1, abs=2e-3)
    for prediction in truth:  # a metre off: no longer within half a metre
        prediction.bboxes_3d.tensor[:, 0] += 1
    assert 0.4 < score(cfg, dataset, truth)[f'{PREFIX}/mAP'] < 0.8


@pytest.mark.parametrize('change, error, message', [
    (lambda data: data.pop(), ValueError, 'exactly the 4 samples of mini_val.*got 3, of wh.* 0 '),
    (lambda data: data[0].update(token='other'), ValueError, 'got 4, of which 1 are not .* and 1'),
    (None, FileNotFoundError, 'v1.0-trainval/scene.json.*set metainfo.version')])
def test_info_files_are_looked_at_before_the_run(two_by_two, change, error, message):
    """When the loop hands over the meta information of the dataset."""
    pytest.importorskip('nuscenes', reason='the nuScenes devkit is not installed')
    from mmdet3d.registry import METRICS
    path = two_by_two / 'synthetic_infos.pkl'
    if change is not None:
        infos = pickle.loads(path.read_bytes())
        change(infos['data_list'])
        path.write_bytes(pickle.dumps(infos))
    meta = dict(classes=(), version='v1.0-trainval' if change is None else 'v1.0-mini')
    cfg = tiny_config(two_by_two).val_evaluator
    with pytest.raises(error, match=message):
        METRICS.build(cfg).dataset_meta = meta
    cfg.update(format_only=True, jsonfile_prefix='out')
    METRICS.build(cfg).dataset_meta = meta


def test_file_for_the_test_server(two_by_two, tmp_path):
    """`format_only` writes what the devkit reads: the true boxes, in the global frame."""
    pytest.importorskip('nuscenes', reason='the nuScenes devkit is not installed')
    from mmdet3d.registry import DATASETS
    from nuscenes.eval.common.loaders import load_prediction
    from nuscenes.eval.detection.data_classes import DetectionBox
    cfg = tiny_config(two_by_two)
    cfg.val_evaluator.update(format_only=True, jsonfile_prefix=str(tmp_path / 'out'))
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    score(cfg, dataset, [truth_of(dataset.get_data_info(index)) for index in range(4)])
    boxes, meta = load_prediction(
        str(tmp_path / 'out' / 'pred_instances_3d' / 'results_nusc.json'), 500, DetectionBox)
    assert meta['use_camera'] and not meta['use_lidar']
    assert sorted(boxes.sample_tokens) == [f'sample-{s}-{f}' for s in (0, 1) for f in (0, 1)]
    for scene, frame in ((0, 0), (0, 1), (1, 0), (1, 1)):
        found = boxes[f'sample-{scene}-{frame}']
        objects = synthetic_rig.make_objects(scene, 8)
        assert len(found) == len(objects)
        for item in objects:
            time = frame * synthetic_rig.PERIOD
            match = min(found, key=lambda box: np.linalg.norm(
                np.array(box.translation) - item.at(time)))
            assert match.detection_name == item.name
            np.testing.assert_allclose(match.translation, item.at(time), atol=1e-3)
            np.testing.assert_allclose(match.velocity, item.velocity, atol=1e-3)
            length, width, height = item.size
            np.testing.assert_allclose(match.size, [width, length, height], atol=1e-3)
