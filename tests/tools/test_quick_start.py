# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The program of `make demo`, shortened, and its two pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from helpers.tool_runner import TINY, TOOLS, load_tool, run_command


def test_from_nothing_to_pictures(tmp_path: Path) -> None:
    data, work_dir = tmp_path / 'data', tmp_path / 'work'
    output = run_command(
        'python', TOOLS / 'demo/quick_start.py', '--config', TINY / 'mask_rcnn.py', '--data', data,
        '--work-dir', work_dir, '--num-train', 4, '--num-val', 3, '--cfg-options',
        'train_cfg.max_epochs=1', 'model.test_cfg.rcnn.score_thr=0.0')
    values = re.search(r'On the held-out split: box AP (\S+), mask AP (\S+)', output)
    assert values and all(0 <= float(value) <= 1 for value in values.groups())
    assert re.search(r'Seconds: training \d+, test \d+, all \d+', output)
    for name in ('curves.png', 'predictions.png'):
        assert str(work_dir / name) in output
        assert cv2.imread(str(work_dir / name)).std() > 10
    assert (data / 'ade/annotations/validation/000003.png').is_file()


@pytest.fixture(scope='module')
def quick_start() -> object:
    return load_tool('demo/quick_start')


def test_curves_are_read_over_iterations(quick_start: object, tmp_path: Path) -> None:
    file = tmp_path / 'scalars.json'
    records = [dict(loss=2.0, step=10), dict(loss=1.0, step=20),
               {'coco/bbox_mAP': 0.1, 'coco/segm_mAP': 0.2, 'step': 1},
               dict(loss=0.5, step=30), {'coco/bbox_mAP': 0.3, 'coco/segm_mAP': 0.4, 'step': 2}]
    file.write_text('\n'.join(map(json.dumps, records)))
    losses, metrics = quick_start.read_curves(file)
    np.testing.assert_array_equal(losses, [[10, 2.0], [20, 1.0], [30, 0.5]])
    assert metrics == {'coco/bbox_mAP': [(20, 0.1), (30, 0.3)],
                       'coco/segm_mAP': [(20, 0.2), (30, 0.4)]}


def test_a_tool_that_fails_ends_the_program(quick_start: object, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        quick_start.run_tool('train.py', str(tmp_path / 'absent.py'))
    assert caught.value.code == 1
