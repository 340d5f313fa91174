# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The picture of boxes: edges where they belong, and the tool on the synthetic rig."""

from __future__ import annotations

import mmcv
import numpy as np
import pytest
import torch
from mmdet3d.registry import MODELS
from mmengine.config import Config

from helpers.bevformer import TINY
from helpers.tool_runner import load_tool


@pytest.fixture(scope='module')
def demo():
    pytest.importorskip('matplotlib', reason='matplotlib is not installed')
    return load_tool('demo/bev_demo')


def test_edges(demo):
    """A cube before the camera: two squares and what joins them; behind it: nothing."""
    from mmdet3d.structures import LiDARInstance3DBoxes
    lidar2cam = np.array([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]])
    cam2img = np.array([[100.0, 0, 50], [0, 100, 40], [0, 0, 1]])
    boxes = LiDARInstance3DBoxes(torch.tensor([[10.0, 0, 0, 2, 2, 2, 0], [-10, 0, 0, 2, 2, 2, 0],
                                               [0.0, 0, 0, 2, 2, 2, 0]]), origin=(0.5, 0.5, 0.5))
    front, behind, around = boxes.corners.numpy()
    image = np.zeros((80, 100, 3), np.uint8)
    demo.draw_edges(image, behind, lidar2cam, cam2img, (255, 0, 0))
    assert not image.any()
    demo.draw_edges(image, front, lidar2cam, cam2img, (255, 0, 0))
    near = round(100 / 9)
    assert image[40, 50 - near, 0] and image[40, 50 + near, 0] and image[40 - near, 50, 0]
    assert not image[40, 50].any() and not image[..., 1:].any()
    assert not image[:, :50 - near - 2].any()
    demo.draw_edges(image, around, lidar2cam, cam2img, (0, 255, 0))  # partly behind the camera


def test_tool(demo, rig, tmp_path, capsys):
    cfg = Config.fromfile(TINY)
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / 'model.pth')
    for name, rest in (('truth.png', []), ('both.png', [str(tmp_path / 'model.pth'),
                                                       '--score-thr', '0.0'])):
        demo.main([str(TINY), *rest, '--index', '1', '--data-root', str(rig), '--out',
                   str(tmp_path / name), '--range', '25', '--device', 'cpu'])
        assert name in capsys.readouterr().out
    truth, both = (mmcv.imread(str(tmp_path / name)) for name in ('truth.png', 'both.png'))
    assert truth.shape == both.shape and truth.shape[1] > 2000
    assert (truth != both).any(-1).mean() > 0.01


@pytest.mark.parametrize('options, message', [
    (['--index', '99'], '--index must be 0 ... 5, got 99'),
    (['no_such.pth'], 'no_such.pth'),
    (['--device', 'gpu'], '--device must be cpu, cuda or cuda:<number>, got gpu'),
    (['--out', 'p.foo'], '--out must end in .png')])
def test_errors(demo, rig, tmp_path, options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        demo.main([str(TINY), '--data-root', str(rig), '--out', str(tmp_path / 'x.png'), *options])
    assert message in str(caught.value) + capsys.readouterr().err


def test_weights_of_another_model(demo, rig, tmp_path):
    torch.save(dict(state_dict={'foo.bar': torch.zeros(2)}), tmp_path / 'foo.pth')
    with pytest.raises(SystemExit, match='foo.pth is not of this model'):
        demo.main([str(TINY), str(tmp_path / 'foo.pth'), '--data-root', str(rig), '--device', 'cpu',
                   '--out', str(tmp_path / 'x.png')])
