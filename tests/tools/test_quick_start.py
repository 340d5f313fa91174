# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The program of `make demo` and for folders of the user, shortened, and its pictures."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from helpers.tool_runner import TINY, TOOLS, load_tool, run_command
from mmdcnv4.datasets.drawn_scenes import write_drawn_scenes


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



@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Runs the program with its tools in this process, which has imported torch; its output."""
    def run(*arguments: object) -> str:
        program = load_tool('demo/quick_start')
        monkeypatch.setattr(program, 'run_tool', lambda name, *rest: load_tool(
            name.removesuffix('.py')).main(list(rest)))
        program.main(list(map(str, arguments)))
        return capsys.readouterr().out
    return run


def test_own_folder_in_coco_layout(run_here, tmp_path: Path) -> None:
    """Drawn scenes without their masks, as boxes of a dataset that nobody has seen."""
    write_drawn_scenes(tmp_path / 'drawn', 4, 2)
    root = tmp_path / 'drawn/coco'
    for file in (root / 'annotations').glob('*.json'):
        content = json.loads(file.read_text())
        for item in content['annotations']:
            del item['segmentation']
        file.write_text(json.dumps(content))
    work_dir = tmp_path / 'own'
    output = run_here(
        '--coco', root, '--work-dir', work_dir,
        '--cfg-options', 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1',
        'default_hooks.checkpoint.interval=1', 'model.backbone.channels=8',
        'model.backbone.groups=(1,1,1,2)', 'model.neck.in_channels=[16,32,64]',
        'model.test_cfg.score_thr=0.0')
    assert '5 classes: disk, ring, square, triangle, star. Boxes; images resized to 160' in output
    assert re.search(r'On the val split: box AP \S+, box AP50 \S+', output)
    written = Config.fromfile(work_dir / 'own.py')
    assert written.train_dataloader.dataset.metainfo.classes == (
        'disk', 'ring', 'square', 'triangle', 'star')
    assert written.model.bbox_head.num_classes == 5
    for name in ('curves.png', 'predictions.png'):
        assert cv2.imread(str(work_dir / name)).std() > 10


def test_own_label_maps(run_here, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    root = tmp_path / 'cells'
    for split, count in (('train', 3), ('val', 2)):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            labels = generator.integers(0, 3, (5, 7), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
            labels[:9] = 9
            name = f'{split}/{number}.png'
            cv2.imwrite(str(root / 'annotations' / name), labels)
            cv2.imwrite(str(root / 'images' / name), np.stack([labels * 80] * 3, axis=2))
    output = run_here(
        '--semantic', root, '--work-dir', tmp_path / 'work', '--classes', 'low', 'middle',
        'high', '--ignore-index', 9,
        '--iterations', 2, '--cfg-options', 'model.backbone.channels=8',
        'model.backbone.groups=(1,1,1,2)', 'model.decode_head.in_channels=[8,16,32,64]',
        'model.auxiliary_head.in_channels=32', 'model.decode_head.channels=8',
        *(f'{loader}_dataloader.num_workers=0' for loader in ('train', 'val', 'test')),
        *(f'{loader}_dataloader.persistent_workers=False' for loader in ('train', 'val', 'test')))
    assert '3 classes: low, middle, high; label 9 is ignored; crops of 32 x 64' in output
    assert re.search(r'On the val split: mIoU \d', output)
    for name in ('curves.png', 'predictions.png'):
        assert cv2.imread(str(tmp_path / 'work' / name)).std() > 10


@pytest.fixture(scope='module')
def quick_start() -> object:
    return load_tool('demo/quick_start')


def test_a_tool_that_fails_ends_the_program(quick_start: object, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as caught:
        quick_start.run_tool('train.py', str(tmp_path / 'absent.py'))
    assert caught.value.code == 1


@pytest.mark.parametrize('arguments, message', [
    (['--coco', 'a', '--semantic', 'b'], 'not allowed with argument'),
    (['--coco', 'a', '--classes', 'b'], 'belong to --semantic'),
    (['--coco', 'a', '--iterations', '0'], '--iterations must be at least 1, got 0')])
def test_arguments_that_do_not_fit(quick_start: object, capsys: pytest.CaptureFixture,
                                   arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit):
        quick_start.parse_args(arguments)
    assert message in capsys.readouterr().err
