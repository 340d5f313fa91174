# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Feature maps of images, against the backbone called by hand."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config

from helpers.tool_runner import TINY, load_tool
from mmdcnv4.cli.analysis import build_model

tool = load_tool('analysis_tools/extract_features')
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def test_maps_and_means(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip('mmseg', reason='mmsegmentation is not installed')
    config = TINY / 'upernet.py'
    model = build_model(Config.fromfile(config)).eval()
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'a.pth')
    image = np.random.default_rng(0).integers(0, 256, (40, 56, 3), np.uint8)
    (tmp_path / 'images').mkdir()
    cv2.imwrite(str(tmp_path / 'images/b.png'), image)
    command = [str(tmp_path / 'images'), str(config), str(tmp_path / 'a.pth'), '--device', 'cpu',
               '--out', str(tmp_path / 'out')]
    tool.main(command)
    assert '1 file(s)' in capsys.readouterr().out
    found = np.load(tmp_path / 'out/b.npz')
    rgb = (image[:, :, ::-1].astype(np.float32) - MEAN) / STD
    with torch.no_grad():
        maps = model.backbone(torch.tensor(rgb.transpose(2, 0, 1)[None], dtype=torch.float32))
    assert list(found) == ['stage_0', 'stage_1', 'stage_2', 'stage_3']
    for stage, features in enumerate(maps):
        np.testing.assert_allclose(found[f'stage_{stage}'], features[0], rtol=1e-3, atol=1e-3)
    tool.main([*command, '--pool'])
    np.testing.assert_allclose(np.load(tmp_path / 'out/b.npz')['mean'], maps[-1][0].mean((1, 2)),
                               rtol=1e-3, atol=1e-3)


def test_what_is_no_image_is_named(tmp_path: Path) -> None:
    (tmp_path / 'a.png').write_bytes(b'no image')
    command = [str(TINY / 'upernet.py'), 'none', '--device', 'cpu', '--out', str(tmp_path / 'out')]
    with pytest.raises(SystemExit, match='a.png: the file is empty or corrupt'):
        tool.main([str(tmp_path / 'a.png'), *command])
    with pytest.raises(SystemExit, match='neither an image nor a folder with images'):
        tool.main([str(tmp_path / 'absent'), *command])
