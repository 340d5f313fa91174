# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures and videos of boxes: edges where they belong, and the tool on the synthetic rig."""

from __future__ import annotations

import json
import pickle

import cv2
import mmcv
import numpy as np
import pytest
import torch
from mmdet3d.registry import MODELS
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.config import Config
from mmengine.registry import DefaultScope

from helpers.bevformer import TINY
from helpers.tool_runner import load_tool
from mmdcnv4.bevformer_v2 import drawing
from mmdcnv4.bevformer_v2.results import found_in, read_results
from mmdcnv4.cli import video
from mmdcnv4.errors import UserError


@pytest.fixture(scope='module')
def demo():
    return load_tool('demo/bev_demo')


def boxes_of(rows):
    return LiDARInstance3DBoxes(torch.tensor(rows, dtype=torch.float32).reshape(-1, 9), box_dim=9,
                                origin=(0.5, 0.5, 0.5))


# ---------------------------------------------------------------------------------------- drawing


def test_edges():
    """A cube before the camera: two squares and what joins them; behind it: nothing."""
    lidar2cam = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    cam2img = np.array([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]])
    boxes = LiDARInstance3DBoxes(torch.tensor([[10.0, 0, 0, 2, 2, 2, 0], [-10, 0, 0, 2, 2, 2, 0],
                                               [0.0, 0, 0, 2, 2, 2, 0]]), origin=(0.5, 0.5, 0.5))
    front, behind, around = boxes.corners.numpy()
    image = np.zeros((80, 100, 3), np.uint8)
    drawing.draw_edges(image, behind, lidar2cam, cam2img, (255, 0, 0))
    assert not image.any()
    drawing.draw_edges(image, front, lidar2cam, cam2img, (255, 0, 0))
    near = round(100 / 9)
    assert image[40, 50 - near, 0] and image[40, 50 + near, 0] and image[40 - near, 50, 0]
    assert not image[40, 50].any() and not image[..., 1:].any()
    assert not image[:, :50 - near - 2].any()
    drawing.draw_edges(image, around, lidar2cam, cam2img, (0, 255, 0))  # partly behind the camera


def test_the_view_from_above():
    """A box 10 m ahead and 5 m to the right; its front line shows to the right (yaw 0)."""
    layer = drawing.Layer(boxes_of([[5.0, 10, 0, 4, 2, 1, 0, 0, 0]]), [1])
    red = (255, 0, 0)
    picture = drawing.draw_plane(layer, [red], 400, 20.0, '')  # 10 pixels per metre
    is_red = (picture[..., 0] > 200) & (picture[..., 1] < 60)
    rows, columns = np.nonzero(is_red)
    assert abs(rows.min() - 90) <= 2 and abs(rows.max() - 110) <= 2  # 200 - 10 * (10 +- 1)
    assert abs(columns.min() - 230) <= 2 and abs(columns.max() - 270) <= 2  # 200 + 10 * (5 +- 2)
    assert is_red[100, 252:269].all() and not is_red[100, 233:248].any()


def test_the_places_of_the_cameras():
    assert drawing.camera_rows(['CAM_BACK', 'CAM_FRONT', 'CAM_FRONT_LEFT']) == [
        ['CAM_FRONT_LEFT', 'CAM_FRONT'], ['CAM_BACK']]
    assert drawing.camera_rows(list('abcde')) == [['a', 'b', 'c'], ['d', 'e']]
    assert drawing.camera_rows(['a', 'b']) == [['a', 'b']]


@pytest.mark.parametrize('count', [1, 10, 23])
def test_classes_have_colours_of_their_own(count):
    assert len(set(drawing.class_colours(count))) == count


def test_the_legend_names_every_class(rig):
    """Every colour is there, also where the names need more than one line."""
    classes = [f'a rather long name of class {index}' for index in range(23)]
    image = np.zeros((40, 80, 3), np.uint8)
    layer = drawing.Layer(boxes_of([]), [])
    picture = drawing.draw_sample(dict(a=image), dict(a={}), layer, layer, classes, 'title')
    assert picture.shape[0] % 2 == picture.shape[1] % 2 == 0
    pixels = set(map(tuple, np.unique(picture.reshape(-1, 3), axis=0).tolist()))
    assert set(drawing.class_colours(23)) <= pixels


# -------------------------------------------------------------------------------------- the tool


@pytest.fixture(scope='module')
def weights(tmp_path_factory, rig):
    path = tmp_path_factory.mktemp('weights') / 'model.pth'
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope('mmdet3d'):
        model = MODELS.build(Config.fromfile(TINY).model)
    torch.save(dict(state_dict=model.state_dict()), path)
    return str(path)


def options(rig, out, *rest):
    return [str(TINY), *map(str, rest), '--data-root', str(rig), '--out', str(out), '--range', '25',
            '--device', 'cpu']


def read_frames(path):
    capture, frames = cv2.VideoCapture(str(path)), []
    while True:
        is_there, frame = capture.read()
        if not is_there:
            return frames
        frames.append(frame)


def test_picture(demo, rig, weights, tmp_path, capsys):
    for name, rest in (('truth.png', []), ('both.png', [weights, '--score-thr', '0.0'])):
        demo.main(options(rig, tmp_path / name, *rest, '--index', '1'))
        assert name in capsys.readouterr().out
    truth, both = (mmcv.imread(str(tmp_path / name)) for name in ('truth.png', 'both.png'))
    assert both.shape[1] > truth.shape[1] > 1900
    cameras = slice(None), slice(0, 3 * 480)
    assert (truth[cameras] != both[cameras]).any(-1).mean() > 0.01


def test_video_of_a_scene(demo, rig, weights, tmp_path, capsys):
    """The second scene, of three key frames; from the inferencer and from the same boxes saved."""
    demo.main(options(rig, tmp_path / 'a.mp4', weights, '--scene', 'scene-1', '--score-thr', '0'))
    assert 'a.mp4: 3 pictures, 1.5 s' in capsys.readouterr().out
    saved = [save_sample(demo, rig, weights, index) for index in (3, 4, 5)]
    (tmp_path / 'p.pkl').write_bytes(pickle.dumps(saved))
    demo.main(options(rig, tmp_path / 'b.mp4', '--results', tmp_path / 'p.pkl', '--scene', '1',
                      '--score-thr', '0'))
    first, second = read_frames(tmp_path / 'a.mp4'), read_frames(tmp_path / 'b.mp4')
    assert len(first) == len(second) == 3
    assert all(np.array_equal(a, b) for a, b in zip(first, second))
    assert not np.array_equal(first[0], first[1])
    assert not list(tmp_path.glob('*.part.mp4'))


def save_sample(demo, rig, weights, index):
    """What `tools/test.py --out` saves of a sample."""
    from mmengine.dataset import pseudo_collate
    args = demo.parse_args(options(rig, 'x.png', weights))
    cfg = Config.fromfile(TINY)
    dataset = demo.build_dataset(cfg, args)
    with torch.no_grad():
        sample = demo.build_model(cfg, args).test_step(pseudo_collate([dataset[index]]))[0]
    return sample.to_dict()


@pytest.mark.parametrize('rest, message', [
    (['--index', '99'], '--index must be 0 ... 5, got 99'),
    (['no_such.pth'], 'the checkpoint no_such.pth does not exist'),
    (['--device', 'gpu'], '--device must be cpu, cuda or cuda:<number>, got gpu'),
    (['--out', 'p.foo'], '--out must end in .png'),
    (['--scene', '0', '--out', 'p.png'], '--out must end in .mp4'),
    (['--scene', 'foo', '--out', 'p.mp4'],
     '--scene must be the token or the number of one of 2 scenes, got foo:\n'
     '0: scene-0 (3 samples)\n1: scene-1 (3 samples)'),
    (['--scene', '2', '--out', 'p.mp4'], 'got 2:'),
    (['--results', 'no.pkl'], 'the results no.pkl do not exist'),
    (['b.pth', '--results', 'a.json'], 'give a checkpoint or --results, not both'),
    (['--scene', '0', '--index', '1'], 'not allowed with'),
    (['--fps', '0'], '--fps must be > 0')])
def test_errors(demo, rig, tmp_path, monkeypatch, rest, message, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        demo.main(['--data-root', str(rig), '--out', str(tmp_path / 'x.png'), str(TINY), *rest])
    assert message in str(caught.value) + capsys.readouterr().err


def test_weights_of_another_model(demo, rig, tmp_path):
    torch.save(dict(state_dict={'foo.bar': torch.zeros(2)}), tmp_path / 'foo.pth')
    with pytest.raises(SystemExit, match='foo.pth is not of this model'):
        demo.main(options(rig, tmp_path / 'x.png', tmp_path / 'foo.pth'))


# ---------------------------------------------------------------------------- results and videos


def test_results_in_the_format_of_nuscenes(rig, tmp_path):
    """The true boxes of the tables, in the global frame, come out as those of the info file."""
    infos = pickle.loads((rig / 'synthetic_infos.pkl').read_bytes())
    classes = tuple(infos['metainfo']['categories'])
    rows = json.loads((rig / 'v1.0-mini/sample_annotation.json').read_text())
    info = infos['data_list'][4]
    mine = sorted((row for row in rows if row['sample_token'] == info['token']),
                  key=lambda row: int(row['token'].rsplit('-', 1)[1]))
    drawn = info['instances']
    lidar2global = np.array(info['ego2global']) @ info['lidar_points']['lidar2ego']
    results = {info['token']: [dict(
        {key: row[key] for key in ('translation', 'size', 'rotation')},
        velocity=(lidar2global[:2, :2] @ item['velocity']).tolist(),
        detection_name=classes[item['bbox_label_3d']], detection_score=0.5)
        for row, item in zip(mine, drawn)]}
    (tmp_path / 'r.json').write_text(json.dumps(dict(meta={}, results=results)))
    found = found_in(read_results(str(tmp_path / 'r.json')), info, classes)
    expected = boxes_of([[*item['bbox_3d'], *item['velocity']] for item in drawn])
    turn = (found.boxes.yaw - expected.yaw + torch.pi) % (2 * torch.pi) - torch.pi
    assert turn.abs().max() < 1e-4
    keep = [0, 1, 2, 3, 4, 5, 7, 8]
    torch.testing.assert_close(found.boxes.tensor[:, keep], expected.tensor[:, keep], atol=1e-4,
                               rtol=0)
    assert found.labels.tolist() == [item['bbox_label_3d'] for item in drawn]
    with pytest.raises(ValueError, match='1 samples without sample-0-0'):
        found_in(read_results(str(tmp_path / 'r.json')), infos['data_list'][0], classes)
    with pytest.raises(ValueError, match="a class out of .'foo'"):
        found_in(read_results(str(tmp_path / 'r.json')), info, ('foo',))


@pytest.mark.parametrize('name, content, message', [
    ('a.txt', b'', 'must be a .pkl of tools/test.py --out or a .json'),
    ('a.pkl', b'no pickle', 'must hold a list of samples'),
    ('a.pkl', pickle.dumps([dict(a=1)]), "must hold a list of samples .* KeyError: 'token'"),
    ('a.json', b'{"a": 1}', "must hold results by sample token: KeyError: 'results'")])
def test_files_that_are_no_results(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_results(str(tmp_path / name))


def test_no_encoder(tmp_path, monkeypatch):
    monkeypatch.setattr(video, '_opencv', lambda *_: None)
    monkeypatch.setattr(video, '_imageio', lambda *_: None)
    with pytest.raises(UserError, match='no encoder mp4v.* pip install imageio imageio-ffmpeg'):
        video.write_video(str(tmp_path / 'a.mp4'), [np.zeros((8, 8, 3), np.uint8)], 2.0)


def test_a_video_that_is_not_whole(tmp_path, monkeypatch):
    """What was there stays, and nothing half-written is left."""
    (tmp_path / 'a.mp4').write_text('old')
    pictures = [np.full((64, 64, 3), shade, np.uint8) for shade in (0, 90, 180)]
    with pytest.raises(ValueError, match='one shape'):
        video.write_video(str(tmp_path / 'a.mp4'), [*pictures, np.zeros((8, 8, 3), np.uint8)], 2.0)
    with pytest.raises(UserError, match='no picture'):
        video.write_video(str(tmp_path / 'a.mp4'), [], 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(video, 'read_video', lambda _: (2, (64, 64)))
        with pytest.raises(UserError, match='should have 3 pictures .* and 2 of'):
            video.write_video(str(tmp_path / 'a.mp4'), pictures, 2.0)
    assert [path.name for path in tmp_path.iterdir()] == ['a.mp4']
    assert (tmp_path / 'a.mp4').read_text() == 'old'
    assert video.write_video(str(tmp_path / 'a.mp4'), pictures, 2.0) == 3
    shades = [frame.mean() for frame in read_frames(tmp_path / 'a.mp4')]
    np.testing.assert_allclose(shades, [0, 90, 180], atol=4)
