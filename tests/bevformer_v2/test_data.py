# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Dataset and pipeline on the synthetic rig, against the matrices that drew it."""

from __future__ import annotations

import json
import pickle
import random

import mmcv
import numpy as np
import pytest
import torch

from mmdcnv4.bevformer_v2 import geometry
from mmdcnv4.bevformer_v2.data.transforms import (
    CAMERAS,
    BEVAugment,
    ClipToUint8,
    LoadTemporalMultiViewImages,
    MultiViewCropResize,
)
from mmdcnv4.bevformer_v2.targets.mono_targets import MonoTargets
from mmdcnv4.datasets import synthetic_rig

LABELS = {name: index for index, name in enumerate(sorted(synthetic_rig.CLASSES))}  # of the model


@pytest.fixture
def edit_infos(rig, tmp_path):
    def edit(change, **metainfo):
        """A copy of the info file after `change(data_list)`; its path."""
        infos = pickle.loads((rig / 'synthetic_infos.pkl').read_bytes())
        change(infos['data_list'])
        infos['metainfo'].update(metainfo)
        path = tmp_path / 'infos.pkl'
        path.write_bytes(pickle.dumps(infos))
        return str(path)
    return edit


def drop_links(data_list):
    for info in data_list:
        for key in ('scene_token', 'prev', 'next'):
            del info[key]


def tokens(info):
    return [None if frame is None else frame['token'] for frame in info['frame_infos']]


def test_neighbours(make_dataset):
    dataset = make_dataset(frames=(-2, -1, 0, 1))
    assert tokens(dataset.get_data_info(0)) == [None, None, 'sample-0-0', 'sample-0-1']
    assert tokens(dataset.get_data_info(2)) == ['sample-0-0', 'sample-0-1', 'sample-0-2', None]
    assert tokens(dataset.get_data_info(3)) == [None, None, 'sample-1-0', 'sample-1-1']


def test_neighbours_do_not_depend_on_the_order(make_dataset, edit_infos):
    dataset = make_dataset(ann_file=edit_infos(random.Random(3).shuffle))
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        scene, frame = map(int, info['token'].split('-')[1:])
        assert info['sample_idx'] == index
        assert tokens(info) == [f'sample-{scene}-{frame - 1}' if frame else None, info['token']]


def test_links_from_the_scene_table(make_dataset, edit_infos, rig, tmp_path):
    ann_file = edit_infos(drop_links)
    table = rig / 'v1.0-mini' / 'sample.json'
    dataset = make_dataset(ann_file=ann_file, scene_table=str(table))
    assert tokens(dataset.get_data_info(4)) == ['sample-1-0', 'sample-1-1']
    dataset = make_dataset(ann_file=ann_file, metainfo=dict(
        classes=list(LABELS), version='v1.0-mini'))  # at the default place
    assert tokens(dataset.get_data_info(1)) == ['sample-0-0', 'sample-0-1']
    make_dataset(ann_file=ann_file, frames=(0,))  # needs none
    short = tmp_path / 'sample.json'
    short.write_text(json.dumps(json.loads(table.read_text())[:-1]))
    with pytest.raises(ValueError, match='every sample, got none for 1, the first sample-1-2'):
        make_dataset(ann_file=ann_file, scene_table=str(short))


@pytest.mark.parametrize('changes, error, message', [
    (dict(frames=(0, -1)), ValueError, 'frames must be ascending and contain 0'),
    (dict(frames=(-1,)), ValueError, 'frames must be ascending and contain 0'),
    (dict(no_such=1), TypeError, 'no_such')])
def test_refused_arguments(make_dataset, changes, error, message):
    with pytest.raises(error, match=message):
        make_dataset(**changes)


def test_refused_files(make_dataset, edit_infos, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'\(-1, 0\) need the links.*sample.json'):
        make_dataset(ann_file=edit_infos(drop_links), metainfo=dict(version='v1.0-trainval'))
    with pytest.raises(ValueError, match="info_version '1.1', got '1.0'"):
        make_dataset(ann_file=edit_infos(lambda data: None, info_version='1.0'))
    old = tmp_path / 'old.pkl'
    for content in (dict(infos=[], metadata=dict(version='v1.0-trainval')), [dict(token='a')]):
        old.write_bytes(pickle.dumps(content))
        with pytest.raises(ValueError, match='0.x use other box conventions'):
            make_dataset(ann_file=str(old))


@pytest.mark.parametrize('path', [
    'instances', 'ego2global', 'images', 'lidar_points', 'lidar_points.lidar2ego',
    'images.CAM_BACK.cam2img', 'images.CAM_BACK.lidar2cam', 'images.CAM_BACK.img_path'])
def test_refuses_a_sample_without_an_entry(make_dataset, edit_infos, path):
    *parents, last = path.split('.')

    def drop(data_list):
        node = data_list[1]
        for key in parents:
            node = node[key]
        node[last] = None

    with pytest.raises(KeyError, match=f'infos.pkl must give {path} for .*, got none for sample-0'):
        make_dataset(ann_file=edit_infos(drop))
    if path == 'instances':  # not needed to test
        assert len(make_dataset(ann_file=edit_infos(
            lambda data: [info.pop(path) for info in data]), test_mode=True,
            load_eval_anns=False)) > 1


def drop_keys(*keys):
    def change(data_list):
        for info in data_list:
            info.pop('cam_instances') if 'cam_instances' in keys else None
            for item in info['instances']:
                for key in keys:
                    item.pop(key, None)
    return change


def test_data_without_lidar_tracks_and_attributes(make_dataset, edit_infos):
    keys = ('num_lidar_pts', 'num_radar_pts', 'bbox_3d_isvalid', 'velocity', 'cam_instances')
    with pytest.warns(UserWarning) as caught:
        sample = make_dataset(ann_file=edit_infos(drop_keys(*keys)))[1]['data_samples']
    found = [str(warning.message) for warning in caught if 'gives no' in str(warning.message)]
    assert sorted(text.split('gives no ')[1].split(':')[0] for text in found) == [
        'cam_instances', 'num_lidar_pts', 'velocity']  # each once
    assert 'attribute loss of the perspective head will be zero' in ' '.join(found)
    expected = make_dataset()[1]['data_samples']
    assert torch.equal(sample.gt_mono.bboxes, expected.gt_mono.bboxes)
    assert sample.gt_mono.speeds.isnan().all() and (sample.gt_mono.attrs == 3).all()
    assert len(sample.gt_instances_3d) == len(expected.gt_instances_3d)


@pytest.mark.parametrize('key, changes', [
    ('bbox_3d', {}), ('bbox_label_3d', {}), ('num_lidar_pts', dict(use_valid_flag=False))])
def test_refuses_an_object_without_an_entry(make_dataset, edit_infos, key, changes):
    with pytest.raises(KeyError, match=f'must give instances.{key} for every obj.*sample sample-0'):
        make_dataset(ann_file=edit_infos(drop_keys(key)), **changes)


def test_classes_of_ones_own(make_dataset, edit_infos):
    names = ['tram', *synthetic_rig.CLASSES[1:]]
    ann_file = edit_infos(lambda data: None,
                          categories={name: index for index, name in enumerate(names)})
    with pytest.raises(ValueError, match=r"info_classes must be .*infos.pkl, \('tram', 'truck'"):
        make_dataset(ann_file=ann_file)
    own = dict(classes=['truck', 'tram'], version='v1.0-mini')
    with pytest.raises(ValueError, match="got .*'tram'.*set info_classes"):
        make_dataset(ann_file=ann_file, metainfo=own)
    info = make_dataset(ann_file=ann_file, metainfo=own, info_classes=names).get_data_info(1)
    assert info['label_mapping'][0] == 1 and info['label_mapping'][1] == 0
    assert info['classes'] == ('truck', 'tram')


def test_a_subset_has_neighbours_in_the_subset(make_dataset):
    dataset = make_dataset(indices=[1, 2, 3])
    assert [tokens(dataset.get_data_info(i)) for i in range(3)] == [
        [None, 'sample-0-1'], ['sample-0-1', 'sample-0-2'], [None, 'sample-1-0']]


def test_packed_sample(make_dataset):
    dataset = make_dataset()
    sample = dataset[1]
    images, data = sample['inputs']['img'], sample['data_samples']
    assert images.shape == (12, 3, 96, 256) and images.dtype == torch.uint8
    assert data.lidar2img.shape == (2, 6, 4, 4) and data.lidar2img.dtype == np.float32
    assert data.cam2img.shape == data.lidar2cam.shape == (6, 4, 4)
    assert data.frame_valid.tolist() == [True, True] and data.sample_idx == 1
    assert data.gt_instances_3d.bboxes_3d.tensor.shape == (8, 9)
    names = [item.name for item in synthetic_rig.make_objects(0, 8)]
    assert data.gt_instances_3d.labels_3d.tolist() == [LABELS[name] for name in names]
    assert data.gt_mono.bboxes.dtype == torch.float32 and len(data.gt_mono) > 5
    first = dataset[0]
    assert first['data_samples'].frame_valid.tolist() == [False, True]
    torch.testing.assert_close(first['inputs']['img'][:6], first['inputs']['img'][6:])


def pipeline(make_dataset, index=1, **dataset):
    results = make_dataset(**dataset).get_data_info(index)
    return LoadTemporalMultiViewImages()(results)


def test_cameras_keep_their_order(make_dataset, rig):
    results = pipeline(make_dataset)
    for position, camera in enumerate(CAMERAS):
        path = rig / 'samples' / camera / 'sample-0-0.jpg'
        np.testing.assert_array_equal(results['img'][position], mmcv.imread(str(path)))
        expected = np.linalg.inv(synthetic_rig.camera2ego(synthetic_rig.CAMERAS[camera]))
        np.testing.assert_allclose(results['lidar2cam'][1, position],
                                   expected @ synthetic_rig.LIDAR2EGO, atol=1e-9)


def test_a_point_that_stands_still(make_dataset):
    """Projected by frame -1's own matrices, and by those that start in the current LiDAR frame."""
    results = MultiViewCropResize((0, 40, 320, 160), (97,))(pipeline(make_dataset))
    lidar2img = results['cam2img'] @ results['lidar2cam']
    rng = np.random.default_rng(0)
    for point in np.append(rng.uniform(-9, 9, (20, 3)), np.ones((20, 1)), 1):
        world = synthetic_rig.ego2global(0, 0.5) @ synthetic_rig.LIDAR2EGO @ point
        for position, camera in enumerate(CAMERAS):
            own = np.linalg.inv(synthetic_rig.ego2global(0, 0.0)
                                @ synthetic_rig.camera2ego(synthetic_rig.CAMERAS[camera])) @ world
            raw = synthetic_rig.CAM2IMG @ own[:3]
            if raw[2] > 0.5:
                raw = raw[:2] / raw[2]
                expected = [raw[0] * 259 / 320, (raw[1] - 40) * 97 / 120]
                pixel = lidar2img[0, position] @ point
                np.testing.assert_allclose(pixel[:2] / pixel[2], expected, atol=1e-6)


def test_missing_files(make_dataset, rig):
    results = make_dataset().get_data_info(1)
    results['frame_infos'][0]['images']['CAM_BACK']['img_path'] = str(rig / 'none.jpg')
    with pytest.raises(FileNotFoundError, match='CAM_BACK of sample sample-0-0 at .*none.jpg'):
        LoadTemporalMultiViewImages()(results)
    results['frame_infos'][0]['images']['CAM_BACK']['img_path'] = str(rig / 'broken.jpg')
    for content in (b'no image', b''):
        (rig / 'broken.jpg').write_bytes(content)
        with pytest.raises(ValueError, match='CAM_BACK of sample sample-0-0 at .*broken.jpg cann'):
            LoadTemporalMultiViewImages()(results)
    del results['frame_infos'][0]['images']['CAM_BACK']
    with pytest.raises(KeyError, match='sample-0-0 must have camera CAM_BACK'):
        LoadTemporalMultiViewImages()(results)


def test_crop_and_resize(make_dataset):
    results = pipeline(make_dataset)
    before = [image.copy() for image in results['img']]
    cam2img = results['cam2img'].copy()
    results = MultiViewCropResize((16, 40, 304, 160), (60,), img_flip_prob=1.0)(results)
    assert results['img_shape'] == (60, 144) and results['img_flip']
    np.testing.assert_array_equal(
        results['img'][3], mmcv.imresize(before[3][40:160, 16:304].copy(), (144, 60)))
    pixel = np.array([100.0, 80, 1, 0])
    np.testing.assert_allclose(
        results['cam2img'][0, 0] @ np.linalg.inv(cam2img[0, 0]) @ pixel, [42, 20, 1, 0], atol=1e-9)
    with pytest.raises(ValueError, match='crop must be inside the image 144 x 60'):
        MultiViewCropResize((0, 0, 145, 60))(results)
    with pytest.raises(ValueError, match=r'MultiViewCropResize: crop must be four .*\(0, 0, 9\)'):
        MultiViewCropResize((0, 0, 9))
    for heights in (64, (), (0,), (64.5,)):
        with pytest.raises(ValueError, match='MultiViewCropResize: heights must be a list of int'):
            MultiViewCropResize((0, 0, 9, 9), heights)


def test_clip():
    images = [np.array([[[260.4, -3.0, 17.6]]], np.float32)]
    assert ClipToUint8()(dict(img=images))['img'][0].tolist() == [[[255, 0, 18]]]
    images = [np.arange(12, dtype=np.uint8).reshape(2, 2, 3)]
    assert ClipToUint8()(dict(img=images))['img'][0] is images[0]  # bytes are left alone


def test_no_transform_touches_what_it_need_not(make_dataset, monkeypatch):
    """Images that are used once are not copied, and those of the right size are not resized."""
    info = make_dataset().get_data_info(1)
    read = []

    def load(self, info, camera):
        read.append(np.zeros((160, 320, 3), np.uint8))
        return read[-1]

    monkeypatch.setattr(LoadTemporalMultiViewImages, '_load', load)
    results = LoadTemporalMultiViewImages()(info)
    assert all(one is other for one, other in zip(results['img'], read)) and len(read) == 12
    monkeypatch.setattr(mmcv, 'imresize', None)
    results = MultiViewCropResize((0, 40, 320, 160), (120,))(results)
    assert results['img'][0].shape == (120, 320, 3)
    first = LoadTemporalMultiViewImages()(make_dataset().get_data_info(0))  # frame -1 is missing
    assert not any(np.shares_memory(*pair) for pair in zip(first['img'][:6], first['img'][6:]))


def test_photometric_distortion_of_every_image_by_itself(tiny):
    from mmdet3d.registry import TRANSFORMS
    np.random.seed(0)
    distort = TRANSFORMS.build(tiny.photometric)
    results = distort(dict(img=[np.full((4, 4, 3), 90, np.uint8) for _ in range(12)]))
    values = {tuple(image[0, 0].round(3).tolist()) for image in ClipToUint8()(results)['img']}
    assert len(values) > 6 and set(results) == {'img'}


def test_augmentation_draws_what_it_says():
    from mmdet3d.structures import LiDARInstance3DBoxes
    np.random.seed(0)
    seen = []
    for _ in range(40):
        boxes = LiDARInstance3DBoxes(torch.tensor([[9.0, -4, 1, 4, 2, 1.5, 0.7, 1, 2]]), box_dim=9)
        results = BEVAugment()(dict(gt_bboxes_3d=boxes))
        matrix = torch.from_numpy(results['bda_mat'])
        torch.testing.assert_close(boxes.tensor[0, :2], matrix[:2, :2] @ torch.tensor([9.0, -4]))
        seen.append((float(matrix[2, 2]), float(torch.linalg.det(matrix[:2, :2])) > 0))
    assert min(seen)[0] >= 0.95 and max(seen)[0] <= 1.05 and {same for _, same in seen} == {
        True, False}


def mono_results(objects, lidar2cam, attributes=None):
    return dict(
        instances=objects, label_mapping={0: 3, 1: 9, -1: -1}, frames=(0,), cameras=('CAM',),
        cam2img=np.array([[np.diag([200.0, 200, 1, 1]) + np.array(
            [[0, 0, 50, 0], [0, 0, 25, 0], [0, 0, 0, 0], [0, 0, 0, 0]])]]),
        lidar2cam=lidar2cam[None, None], image_transform=np.eye(3), ori_shape=(50, 100),
        img_shape=(50, 100), cam_instances=dict(CAM=attributes or []))


def an_object(x, y=0.0, label=0, points=3, size=(4.0, 2, 1.5)):
    return dict(bbox_3d=[x, y, 0.0, *size, 0.0], bbox_label_3d=label, num_lidar_pts=points - 1,
                num_radar_pts=1, velocity=[3.0, 4.0])


FORWARD = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])


def test_mono_targets_by_hand():
    seen = an_object(20.0)
    target = MonoTargets()(mono_results([seen], FORWARD))['gt_mono']
    assert target['labels'].tolist() == [3] and target['speeds'].tolist() == [5]
    assert target['depths'].tolist() == [20]
    assert target['centers_2d'].tolist() == [[50, 25]]
    assert target['sizes_wlh'].tolist() == [[2, 4, 1.5]]
    # the near face, 18 m away
    np.testing.assert_allclose(target['bboxes'][0], [50 - 200 / 18, 25 - 150 / 18, 50 + 200 / 18,
                                                     25 + 150 / 18], rtol=1e-6)
    np.testing.assert_allclose(target['rots'][0], FORWARD[:3, :3])
    assert target['attrs'].tolist() == [3] and target['cam_idx'].tolist() == [0]


@pytest.mark.parametrize('item, is_kept', [
    (an_object(20.0), True), (an_object(20.0, points=2), False), (an_object(20.0, label=-1), False),
    (an_object(-20.0), False), (an_object(1.9), False), (an_object(30.0, y=20.0), False),
    # half, and a tenth, of the box inside the image
    (an_object(20.0, y=4.5, size=(0.02, 2, 1)), True),
    (an_object(20.0, y=5.8, size=(0.02, 2, 1)), False)])
def test_which_objects_a_camera_sees(item, is_kept):
    target = MonoTargets()(mono_results([item], FORWARD))['gt_mono']
    assert len(target['labels']) == is_kept


def test_attributes_by_label_and_place():
    objects = [an_object(20.0), an_object(25.0, label=1)]
    known = [dict(bbox_3d=[0, 0, 25.0], bbox_label_3d=1, attr_label=7),
             dict(bbox_3d=[0, 0, 20.02], bbox_label_3d=0, attr_label=6),
             dict(bbox_3d=[0, 0, 20.0], bbox_label_3d=1, attr_label=0)]
    target = MonoTargets()(mono_results(objects, FORWARD, known))['gt_mono']
    assert target['attrs'].tolist() == [1, 2]
    known[1]['bbox_3d'] = [0, 0, 20.06]
    known[0]['attr_label'] = 8
    target = MonoTargets()(mono_results(objects, FORWARD, known))['gt_mono']
    assert target['attrs'].tolist() == [3, 3]


def test_mono_targets_agree_with_the_info_file(make_dataset):
    """Camera by camera the objects of `cam_instances`, found by another way."""
    results = MultiViewCropResize((0, 0, 320, 160), (160,))(pipeline(make_dataset))
    target = MonoTargets(min_visibility=0.0)(results)['gt_mono']
    count = 0
    for position, camera in enumerate(CAMERAS):
        own = target['cam_idx'] == position
        for item in results['cam_instances'][camera]:
            apart = np.abs(target['centers_2d'][own] - item['center_2d']).max(1)
            row = apart.argmin()
            assert apart[row] < 1e-3
            assert target['depths'][own][row] == pytest.approx(item['depth'], abs=1e-4)
            np.testing.assert_allclose(target['bboxes'][own][row], item['bbox'], atol=1e-2)
            # parked and standing 1, moving 0, stopped 2, none 3
            expected = {1: 1, 2: 0, 3: 1, 5: 0, 6: 1, 7: 2, 8: 3}[item['attr_label']]
            assert target['attrs'][own][row] == expected
            count += 1
    assert count >= 6


def test_augmented_boxes_do_not_reach_the_perspective_targets(make_dataset, tiny):
    pipe = tiny.train_dataloader.dataset.pipeline
    augmented = [*pipe[:2], dict(type='BEVAugment'), *pipe[2:]]
    plain, moved = make_dataset()[1], make_dataset(pipeline=augmented)[1]
    for key, value in plain['data_samples'].gt_mono.items():
        torch.testing.assert_close(moved['data_samples'].gt_mono[key], value)
    matrix = torch.from_numpy(moved['data_samples'].bda_mat)
    before = plain['data_samples'].gt_instances_3d.bboxes_3d.gravity_center
    after = moved['data_samples'].gt_instances_3d.bboxes_3d.gravity_center
    apart = torch.cdist(before @ matrix.T, after)
    assert apart.amin(0).max() < 1e-4  # what left the range is missing, the rest has moved


def test_drawn_objects_are_where_the_matrices_say(make_dataset):
    """The colour at the projected centre of a box that nothing hides is that of its class."""
    results = pipeline(make_dataset)
    colours = {synthetic_rig.CLASSES.index(name): np.array(kind[1])
               for name, kind in synthetic_rig.KINDS.items()}
    hits = 0
    for position in range(6):
        boxes = torch.tensor([item['bbox_3d'] for item in results['instances']]).double()
        lidar2cam = torch.from_numpy(results['lidar2cam'][1, position])
        centers, _, _ = geometry.lidar_boxes_to_camera(boxes, lidar2cam)
        pixels = centers.numpy() @ synthetic_rig.CAM2IMG.T
        for item, pixel in zip(results['instances'], pixels):
            u, v = (pixel[:2] / pixel[2]).round().astype(int) if pixel[2] > 2 else (-1, -1)
            if 4 <= u < 316 and 4 <= v < 156:
                drawn = results['img'][6 + position][v, u].astype(float)
                true = colours[item['bbox_label_3d']]
                cosine = drawn @ true / np.linalg.norm(drawn) / np.linalg.norm(true)
                hits += cosine > 0.97
    assert hits >= 6
