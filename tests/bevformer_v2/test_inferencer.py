# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The inferencer against the test loop of the dataset, and what it refuses."""

from __future__ import annotations

import copy
import pickle

import mmcv
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate

from helpers.bevformer import TINY
from mmdcnv4.bevformer_v2 import BEVInferencer, Calibration
from mmdcnv4.datasets import synthetic_rig

FRAMES = (-2, -1, 0)


def pipeline_of(cfg):
    return cfg.test_dataloader.dataset.pipeline


def call_of(info):
    """What a user would pass for a sample of an info file."""
    images = {camera: mmcv.imread(view['img_path']) for camera, view in info['images'].items()}
    return images, Calibration.from_info(info), np.array(info['ego2global']), info['timestamp']


@pytest.fixture
def dataset(tiny, rig):
    from mmdet3d.registry import DATASETS
    cfg = copy.deepcopy(tiny.test_dataloader.dataset)
    cfg.update(data_root=str(rig), frames=FRAMES)
    return DATASETS.build(cfg)


@pytest.fixture
def make_inferencer(tiny, make_model):
    def build(frames=FRAMES, **options):
        return BEVInferencer(make_model(frames=frames), pipeline_of(tiny),
                             tiny.classes, **options)
    return build


def same(a, b):
    return (torch.equal(a.bboxes_3d.tensor, b.bboxes_3d.tensor)
            and torch.equal(a.scores_3d, b.scores_3d) and torch.equal(a.labels_3d, b.labels_3d))


@pytest.mark.parametrize('interval', [0.5, None])
def test_equals_the_test_loop(make_inferencer, make_model, dataset, interval):
    """Two scenes of three key frames, to the last bit; the loop computes every map anew."""
    inferencer = make_inferencer(interval=interval)
    model = make_model(frames=FRAMES, cache_maps=False).eval()
    counts = []
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        passes = []
        hook = inferencer.model.img_backbone.register_forward_hook(
            lambda *_, passes=passes: passes.append(1))
        found = inferencer.infer(*call_of(info), scene=info['scene_token'])
        hook.remove()
        with torch.no_grad():
            expected = model.test_step(pseudo_collate([dataset[index]]))[0]
        assert same(found.pred_instances_3d, expected.pred_instances_3d), index
        assert found.frame_valid.tolist() == expected.frame_valid.tolist()
        assert len(found.pred_instances_3d) > 10
        counts.append(len(passes))
    assert counts == [1] * 6, 'the maps of a frame are computed once'


def valid(inferencer, info, timestamp, scene=None):
    images, calibration, pose, _ = call_of(info)
    return inferencer.infer(images, calibration, pose, timestamp, scene).frame_valid.tolist()


def test_the_history_by_time(make_inferencer, dataset):
    """Four calls per second: the frames half a second and a second ago, not the last two."""
    inferencer, info = make_inferencer(), dataset.get_data_info(0)
    images, calibration, pose, _ = call_of(info)
    for call in range(6):
        tokens = inferencer.infer(images, calibration, pose, 0.25 * call).frame_tokens
        seen = {index: int(token.rsplit('-', 1)[1]) - 1 for index, token in tokens.items()}
        expected = {0: call - 4, 1: call - 2, 2: call}  # of frames -2, -1, 0
        assert seen == {index: number for index, number in expected.items() if number >= 0}
    assert len(inferencer._history) == 5  # 1.25 s ago is too long for any later call


def test_what_drops_the_history(make_inferencer, dataset, caplog):
    inferencer, info = make_inferencer(), dataset.get_data_info(0)
    assert valid(inferencer, info, 0.0, 'a') == [False, False, True]
    assert valid(inferencer, info, 0.5, 'a') == [False, True, True]
    assert valid(inferencer, info, 1.0, 'b') == [False, False, True]  # another scene
    assert valid(inferencer, info, 1.5, 'b') == [False, True, True]
    assert valid(inferencer, info, 3.1, 'b') == [False, False, True]  # 1.6 s later
    assert valid(inferencer, info, 3.6, 'b') == [False, True, True]
    inferencer.reset()
    assert not inferencer.model.map_cache._entries
    assert valid(inferencer, info, 0.0, 'b') == [False, False, True]  # any time after reset()


def test_a_reused_buffer_does_not_change_the_past(make_inferencer, dataset):
    """A driver writes the next images into the same memory; maps are recomputed without cache."""
    found = []
    for reuse in (False, True):
        inferencer = make_inferencer(frames=(-1, 0))
        images, *rest = call_of(dataset.get_data_info(0))
        inferencer.infer(images, *rest)
        inferencer.model.map_cache.clear()
        images_now, *rest = call_of(dataset.get_data_info(1))
        if reuse:
            for camera in images:
                images[camera][:] = images_now[camera]
            images_now = images
        found.append(inferencer.infer(images_now, *rest).pred_instances_3d)
    assert same(*found)


def test_a_failed_call_leaves_the_history_alone(make_inferencer, dataset):
    inferencer, info = make_inferencer(frames=(-1, 0)), dataset.get_data_info(0)
    images, calibration, pose, _ = call_of(info)
    with pytest.raises(ValueError, match='crop must be inside the image 10 x 10'):
        inferencer.infer(dict.fromkeys(images, np.zeros((10, 10, 3), np.uint8)), calibration, pose,
                         0.0)
    assert valid(inferencer, info, 0.5) == [False, True]


def mirrored(matrix):
    return np.diag([-1.0, 1, 1, 1]) @ matrix


@pytest.mark.parametrize('change, error, message', [
    (lambda call: call[0].pop('CAM_BACK'), KeyError, 'images must have the cameras .*CAM_BACK'),
    (lambda call: call[0].update(CAM_BACK='a.jpg'), TypeError, "images.'CAM_BACK'. .* got str"),
    (lambda call: call[0].update(CAM_BACK=np.zeros((160, 320, 3))), TypeError, 'got float64'),
    (lambda call: call[0].update(CAM_BACK=np.zeros((160, 320), np.uint8)), ValueError, 'H, W, 3'),
    (lambda call: call.__setitem__(2, np.eye(3)), ValueError, 'ego_pose .*4, 4'),
    (lambda call: call.__setitem__(2, 2 * np.eye(4)), ValueError, 'ego_pose must be a rotation'),
    (lambda call: call.__setitem__(2, mirrored(call[2])), ValueError, 'ego_pose .*mirror'),
    (lambda call: call.__setitem__(2, call[2].T), ValueError, 'translation in the last column'),
    (lambda call: call.__setitem__(3, float('nan')), ValueError, 'timestamp .*got nan'),
    (lambda call: call.__setitem__(3, -1.0), ValueError, 'later than .* call before, 0.0 seconds'),
    (lambda call: call[1].cam2img.pop('CAM_BACK'), KeyError, 'cam2img must have the cameras')])
def test_errors(make_inferencer, dataset, change, error, message):
    inferencer, info = make_inferencer(frames=(-1, 0)), dataset.get_data_info(0)
    inferencer.infer(*call_of(info))
    call = [*call_of(info)]
    call[3] += 0.5
    change(call)
    with pytest.raises(error, match=message):
        inferencer.infer(*call)
    assert valid(inferencer, info, 0.5) == [True, True]


@pytest.mark.parametrize('options, message', [
    (dict(interval=0.0), 'interval must be > 0'), (dict(max_gap=-1), 'max_gap must be > 0'),
    (dict(frames=(-1, 0, 1)), 'future of a call')])
def test_options(make_inferencer, options, message):
    with pytest.raises(ValueError, match=message):
        make_inferencer(**options)


def test_calibration_from_camera_poses():
    cameras = synthetic_rig.CAMERAS
    poses = {camera: synthetic_rig.camera2ego(angle) for camera, angle in cameras.items()}
    intrinsics = dict.fromkeys(cameras, synthetic_rig.CAM2IMG)
    calibration = Calibration.from_cam2ego(synthetic_rig.LIDAR2EGO, intrinsics, poses)
    point = np.array([1.0, 10, 0, 1])  # ahead of the car: x right, y ahead
    seen = calibration.lidar2cam['CAM_FRONT'] @ point
    assert seen[2] > 8 and abs(seen[0] - 1) < 1e-9
    with pytest.raises(ValueError, match="lidar2cam.'a'. must be a rotation"):
        Calibration(np.eye(4), dict(a=np.eye(3)), dict(a=np.diag([1.0, 1, -1, 1])))
    with pytest.raises(ValueError, match="cam2img.'a'. must be .*3, 3"):
        Calibration(np.eye(4), dict(a=np.eye(4)), dict(a=np.eye(4)))


def test_from_config(make_model, dataset, tiny, tmp_path):
    model = make_model()
    cfg = Config.fromfile(TINY)
    weights = {f'module.{name}': value for name, value in model.state_dict().items()}
    weights['module.teacher.weight'] = torch.zeros(3)  # a part that the model has not
    torch.save(dict(state_dict=weights, meta=dict(cfg=cfg.pretty_text)), tmp_path / 'a.pth')
    inferencer = BEVInferencer.from_config(TINY, str(tmp_path / 'a.pth'))
    info = dataset.get_data_info(0)
    found = inferencer.infer(*call_of(info)).pred_instances_3d
    expected = BEVInferencer(model, pipeline_of(tiny), tiny.classes).infer(*call_of(info))
    assert same(found, expected.pred_instances_3d) and inferencer.classes == tuple(tiny.classes)
    cfg.model.bev_head.num_queries = 7
    with pytest.raises(ValueError, match='a.pth does not fit the model') as caught:
        BEVInferencer.from_config(cfg, str(tmp_path / 'a.pth'))
    text = str(caught.value)
    assert 'bev_head.query_embedding.weight' in text and '--allow' not in text
    assert 'model.bev_head.num_queries: 60 in the checkpoint, 7 in the config' in text
    (tmp_path / 'b.pth').write_bytes(pickle.dumps([1]))
    with pytest.raises(ValueError):
        BEVInferencer.from_config(cfg, str(tmp_path / 'b.pth'))
