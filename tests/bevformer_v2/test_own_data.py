# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Data of one's own: the generator, the metric against the devkit, the config of the guide."""

from __future__ import annotations

import pickle
import re

import numpy as np
import pytest
import torch
from mmdet3d.registry import DATASETS, METRICS
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.config import Config

from helpers.bevformer import ROOT
from helpers.tool_runner import load_tool
from mmdcnv4.bevformer_v2.data import center_distance_metric as metric
from mmdcnv4.datasets import synthetic_rig

GUIDE = ROOT / 'docs' / 'bevformer_v2_own_data.md'
CLASSES = ('car', 'tram', 'tree', 'kiosk')


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    """Four cameras and four classes, three of which nuScenes does not have."""
    root = tmp_path_factory.mktemp('own')
    synthetic_rig.write(root, num_cameras=4, classes=CLASSES)
    return root


# ---------------------------------------------------------------------------------- the generator


def test_four_cameras_see_all_around(own):
    infos = pickle.loads((own / 'synthetic_infos.pkl').read_bytes())
    assert infos['metainfo']['categories'] == {name: i for i, name in enumerate(CLASSES)}
    for info in infos['data_list']:
        assert list(info['images']) == ['CAM_0', 'CAM_1', 'CAM_2', 'CAM_3']
        assert {item['bbox_label_3d'] for item in info['instances']} == {0, 1, 2, 3}
        for item in info['instances']:
            point = np.array([*item['bbox_3d'][:3], 1.0])
            seen = 0
            for view in info['images'].values():
                x, y, z = np.array(view['cam2img']) @ (np.array(view['lidar2cam']) @ point)[:3]
                seen += z > 0 and 0 < x < synthetic_rig.WIDTH * z
            assert seen >= 1


@pytest.mark.parametrize('count', [1, 2, 5, 6, 8])
def test_rings(count):
    """Neighbours overlap, and six are those of nuScenes."""
    cameras, matrix = synthetic_rig.camera_ring(count), synthetic_rig.intrinsics(count)
    view = 2 * np.degrees(np.arctan(synthetic_rig.WIDTH / 2 / matrix[0, 0]))
    assert len(cameras) == count and 0 in cameras.values()
    assert view > min(360 / count, 119) and matrix[0, 0] == matrix[1, 1]
    assert (count == 6) == (cameras == synthetic_rig.CAMERAS)


@pytest.mark.parametrize('arguments, message', [
    (dict(num_cameras=0), 'num_cameras must be 1 or more, got 0'),
    (dict(classes=['a', 'a']), 'classes must be different names'),
    (dict(classes=[]), 'classes must be different names'),
    (dict(version='v1.0'), "version must be one of .*'v1.0-test'.* got 'v1.0'")])
def test_what_the_generator_refuses(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        synthetic_rig.write(tmp_path, **arguments)


# ------------------------------------------------------------------------------------- the metric


def test_equals_the_devkit():
    """AP at every distance of random boxes in five samples, against the devkit."""
    algo = pytest.importorskip('nuscenes.eval.detection.algo',
                               reason='the nuScenes devkit is not installed')
    from nuscenes.eval.common.data_classes import EvalBoxes
    from nuscenes.eval.common.utils import center_distance
    from nuscenes.eval.detection.data_classes import DetectionBox
    rng = np.random.default_rng(0)
    truth = rng.uniform(-10, 10, (40, 2))
    truth_in = rng.integers(0, 5, 40)
    found = np.concatenate([truth[:30] + rng.normal(0, 0.5, (30, 2)),
                            rng.uniform(-10, 10, (30, 2))])
    found_in = np.concatenate([truth_in[:30], rng.integers(0, 5, 30)])
    scores = rng.permutation(60) / 100

    def boxes(centres, samples, scores=None):
        out = EvalBoxes()
        for index, (centre, sample) in enumerate(zip(centres, samples)):
            out.add_boxes(str(sample), [DetectionBox(
                sample_token=str(sample), translation=(*centre, 0), size=(1, 1, 1),
                rotation=(1, 0, 0, 0), velocity=(0, 0), detection_name='car',
                detection_score=-1.0 if scores is None else float(scores[index]))])
        return out

    values = []
    for distance in (0.5, 1.0, 2.0, 4.0):
        data = algo.accumulate(boxes(truth, truth_in), boxes(found, found_in, scores), 'car',
                               center_distance, distance)
        is_true = metric.match(found, scores, found_in, truth, truth_in, distance) >= 0
        values.append(metric.average_precision(is_true, scores, len(truth)))
        assert values[-1] == pytest.approx(algo.calc_ap(data, 0.1, 0.1), abs=1e-9)
    assert 0 < values[0] < values[-1] < 0.9


def lidar_boxes(rows):
    return LiDARInstance3DBoxes(torch.tensor(rows, dtype=torch.float32).reshape(-1, 9), box_dim=9,
                                origin=(0.5, 0.5, 0.5))


def sample_of(truth, found, labels, scores, true_labels=None):
    true_labels = labels[:len(truth)] if true_labels is None else true_labels
    return dict(
        token='t', eval_ann_info=dict(gt_bboxes_3d=lidar_boxes(truth),
                                      gt_labels_3d=np.array(true_labels)),
        pred_instances_3d=dict(bboxes_3d=lidar_boxes(found), labels_3d=torch.tensor(labels),
                               scores_3d=torch.tensor(scores)))


def evaluate(samples, **options):
    own = METRICS.build(dict(type='CenterDistanceMetric', **options))
    own.dataset_meta = dict(classes=('a', 'b', 'c'))
    own.process({}, samples)
    return own.evaluate(len(samples))


def test_errors_of_the_boxes():
    """One box a metre off, half as long, turned by pi - 0.1 + pi, 3 m/s too fast; no class c."""
    truth = [[0.0, 10, 0, 4, 2, 1, 3.0, 1, 0], [5, 5, 0, 1, 1, 1, 0, 0, 0]]
    found = [[1.0, 10, 0.5, 2, 2, 1, 3.0 - 2 * np.pi + 0.1, 1, 3],
             [5, 5, 0, 1, 1, 1, 0, 0, 0]]
    result = evaluate([sample_of(truth, found, [0, 1], [0.9, 0.8])])
    assert result['bev/b_AP'] == pytest.approx(1) and result['bev/a_AP'] == pytest.approx(0.5)
    assert result['bev/AP_0.5m'] == pytest.approx(0.5) and result['bev/AP_4m'] == pytest.approx(1)
    assert result['bev/mAP'] == pytest.approx(0.75) and 'bev/c_AP' not in result
    assert result['bev/translation_error'] == pytest.approx(0.5)  # means of the two classes
    assert result['bev/scale_error'] == pytest.approx(0.25)
    assert result['bev/orientation_error'] == pytest.approx(0.05, abs=1e-6)
    assert result['bev/velocity_error'] == pytest.approx(1.5)


def test_range_and_samples():
    """A box in another sample is no match, and what is out of range does not count."""
    near, far = [0.0, 10, 0, 4, 2, 1, 0, 0, 0], [0.0, 40, 0, 4, 2, 1, 0, 0, 0]
    samples = [sample_of([near, far], [near], [0], [0.9], [0, 0]),
               sample_of([], [near], [0], [0.8], [])]
    assert evaluate(samples, max_range=20.0)['bev/mAP'] > 0.98
    assert 0.3 < evaluate(samples)['bev/mAP'] < 0.6
    swapped = [sample_of([near], [], [], [], [0]), sample_of([], [near], [0], [0.8], [])]
    assert evaluate(swapped)['bev/mAP'] == 0


@pytest.mark.parametrize('options, message', [
    (dict(distances=[]), 'distances must be numbers > 0'),
    (dict(distances=[0, 1]), 'distances must be numbers > 0'),
    (dict(max_range=0), 'max_range must be > 0')])
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        METRICS.build(dict(type='CenterDistanceMetric', **options))


def test_nothing_to_compare_with():
    sample = sample_of([], [], [], [], [])
    with pytest.raises(ValueError, match='got none in range'):
        evaluate([sample])
    with pytest.raises(ValueError, match='got none for sample t; set test_mode=True'):
        evaluate([dict(sample, eval_ann_info=None)])


# ---------------------------------------------------------------------------------- the guide


def test_the_config_of_the_guide_trains(own, tmp_path):
    """One epoch of four steps and a validation, with the file as it is printed in the guide."""
    text = re.search(r'```python\n(_base_ = .*?)```', GUIDE.read_text(), re.DOTALL)[1]
    (tmp_path / 'own_rig.py').write_text(text.replace('data/own-rig/', f'{own}/'))
    load_tool('train').main([
        str(tmp_path / 'own_rig.py'), '--work-dir', str(tmp_path / 'work'), '--cfg-options',
        'train_cfg.max_epochs=1', 'train_cfg.val_interval=1', 'default_hooks.checkpoint.interval=1',
        f'experiment_name={tmp_path.name}'])
    log = next((tmp_path / 'work').glob('*/*.log')).read_text()
    assert all(f'bev/{name}_AP' in log for name in CLASSES) and 'bev/mAP' in log
    assert (tmp_path / 'work' / 'epoch_1.pth').is_file()
    cfg = Config.fromfile(tmp_path / 'own_rig.py')
    sizes = {name: cfg.sizes[name] for name in CLASSES[1:]}  # those that the guide measured
    for name, (width, length, height) in sizes.items():
        assert (length, width, height) == synthetic_rig.kinds_of(CLASSES)[name][0]


def test_every_key_of_an_info_file_is_in_the_guide(own):
    text = GUIDE.read_text()
    infos = pickle.loads((own / 'synthetic_infos.pkl').read_bytes())

    def keys(node, path=()):
        if isinstance(node, list) and node and isinstance(node[0], dict):
            node = node[0]
        for key, value in node.items() if isinstance(node, dict) else ():
            if not key.startswith('CAM_') and path[-1:] != ('categories',):
                yield key
            yield from keys(value, (*path, key))

    missing = sorted({key for key in keys(infos) if f'`{key}`' not in text})
    assert missing == []


def test_the_least_that_trains(own, tmp_path):
    """Only what the second listing of the guide writes."""
    text = GUIDE.read_text().split('The least that trains')[1]
    keys = set(re.findall(r'(\w+)=', re.search(r'sample = dict\((.*?)\ninfos', text, re.DOTALL)[1]))
    infos = pickle.loads((own / 'synthetic_infos.pkl').read_bytes())

    def only(node):
        if isinstance(node, list):
            return [only(item) for item in node]
        if not isinstance(node, dict):
            return node
        return {key: only(value) for key, value in node.items()
                if key in keys or key.startswith('CAM_')}

    infos = dict(metainfo=dict(info_version='1.1', dataset='mine', version='1'),
                 data_list=only(infos['data_list']))
    assert 'cam_instances' not in infos['data_list'][0]
    assert set(infos['data_list'][0]['instances'][0]) == {'bbox_3d', 'bbox_label_3d', 'velocity'}
    (tmp_path / 'infos.pkl').write_bytes(pickle.dumps(infos))
    text = re.search(r'```python\n(_base_ = .*?)```', GUIDE.read_text(), re.DOTALL)[1]
    (tmp_path / 'own_rig.py').write_text(text)
    cfg = Config.fromfile(tmp_path / 'own_rig.py').train_dataloader.dataset
    cfg.update(data_root=str(own), ann_file=str(tmp_path / 'infos.pkl'))
    with pytest.warns(UserWarning, match='cam_instances'):
        sample = DATASETS.build(cfg)[1]['data_samples']
    assert len(sample.gt_instances_3d) > 4 and len(sample.gt_mono.labels) > 4
    assert sample.frame_valid.tolist() == [True, True]
