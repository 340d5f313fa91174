# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Faults in what the user gives: each is provoked, and ends in one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tool_runner import TINY, data_options, load_tool

train, test, demo = (load_tool(name) for name in ('train', 'test', 'demo/image_demo'))
CONFIG = str(TINY / 'mask_rcnn.py')


@pytest.fixture
def data(scenes: Path, tmp_path: Path) -> Path:
    """A copy of the scenes that a test may damage."""
    return Path(shutil.copytree(scenes, tmp_path / 'data'))


def message_of(main: Callable, *command: str) -> str:
    """The last line with which a tool ends; its exit status is then 1."""
    with pytest.raises(SystemExit) as caught:
        main([str(part) for part in command])
    message = str(caught.value.code)
    assert message.startswith('error: ')
    return message


def train_message(data: Path, work_dir: Path, **entries: object) -> str:
    # the name keeps the loggers of the runs of this process apart
    options = data_options(data, experiment_name=work_dir.parent.name, **entries)
    return message_of(train.main, CONFIG, '--work-dir', work_dir, *options)


def test_missing_annotation_file(data: Path, tmp_path: Path) -> None:
    file = data / 'coco/annotations/instances_train.json'
    file.unlink()
    message = train_message(data, tmp_path / 'work')
    assert f'train_dataloader.dataset.ann_file: the annotation file {file}' in message


def test_missing_image_folder(data: Path, tmp_path: Path) -> None:
    shutil.rmtree(data / 'coco/images/val')
    message = train_message(data, tmp_path / 'work')
    assert f'val_dataloader.dataset.data_prefix.img: the data folder {data}/coco/images/val' \
        in message


def test_missing_drawn_scenes_say_how_to_draw_them(tmp_path: Path) -> None:
    message = train_message(tmp_path / 'drawn_scenes', tmp_path / 'work')
    assert 'python tools/dataset_converters/drawn_scenes.py' in message


@pytest.mark.parametrize('content', ['', '{"images": ['])
def test_corrupt_annotation_file(data: Path, tmp_path: Path, content: str) -> None:
    file = data / 'coco/annotations/instances_train.json'
    file.write_text(content)
    message = train_message(data, tmp_path / 'work')
    assert f'cannot read the annotation file {file}' in message


def test_annotation_file_of_another_layout(data: Path, tmp_path: Path) -> None:
    file = data / 'coco/annotations/instances_train.json'
    file.write_text(json.dumps(dict(pictures=[])))
    message = train_message(data, tmp_path / 'work')
    assert f"the annotation file {file} has no list '" in message


def test_categories_of_another_name(data: Path, tmp_path: Path) -> None:
    file = data / 'coco/annotations/instances_train.json'
    content = json.loads(file.read_text())
    for category in content['categories']:
        category['name'] += '_'
    file.write_text(json.dumps(content))
    message = train_message(data, tmp_path / 'work')
    assert 'has no image left' in message and 'metainfo.classes' in message


@pytest.mark.parametrize(('content', 'workers'), [(b'', 0), (b'\xff\xd8\xff\xe0 no image', 1)])
def test_corrupt_image(data: Path, tmp_path: Path, content: bytes, workers: int) -> None:
    file = data / 'coco/images/train/000003.jpg'
    file.write_bytes(content)
    message = train_message(data, tmp_path / 'work',
                            **{'train_dataloader.num_workers': workers})
    assert f'cannot read the image {file}' in message


def test_missing_image(data: Path, tmp_path: Path) -> None:
    file = data / 'coco/images/train/000003.jpg'
    file.unlink()
    assert f'the file {file} does not exist' in train_message(data, tmp_path / 'work')


def test_work_dir_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    message = train_message(data, tmp_path / 'file' / 'work')
    assert f'cannot write to the work directory {tmp_path}/file/work: Not a directory' in message
    if Path('/proc').is_dir():  # as good as a read-only disk, for root too
        assert 'cannot write to the work directory /proc/work' in train_message(
            data, Path('/proc/work'))


def test_missing_pretrained_weights(data: Path, tmp_path: Path) -> None:
    message = train_message(data, tmp_path / 'work', **{
        'model.backbone.init_cfg.type': 'Pretrained',
        'model.backbone.init_cfg.checkpoint': 'absent.pth'})
    assert 'model.backbone.init_cfg.checkpoint: the pre-trained weights absent.pth' in message


def test_unknown_type(data: Path, tmp_path: Path) -> None:
    message = train_message(data, tmp_path / 'work', **{'model.neck.type': 'FPNN'})
    assert 'FPNN is in no registry' in message


def test_missing_checkpoint(data: Path, tmp_path: Path) -> None:
    absent = tmp_path / 'absent.pth'
    assert f'the checkpoint {absent} does not exist' in message_of(
        test.main, CONFIG, absent, '--work-dir', tmp_path / 'work', *data_options(data))
    assert '--resume: the checkpoint' in message_of(
        train.main, CONFIG, '--resume', absent, '--work-dir', tmp_path / 'work',
        *data_options(data))


@pytest.mark.parametrize(('content', 'expected'), [
    (b'no zip file', 'is no checkpoint'),
    ('half', 'is truncated'),
    ('code', 'could run code, so it is refused'),
])
def test_bad_checkpoint(data: Path, tmp_path: Path, content: object, expected: str) -> None:
    file = tmp_path / 'bad.pth'
    if content == 'code':
        torch.save(dict(state_dict={}, extra=np.random.default_rng(0)), file)
    elif content == 'half':
        torch.save(dict(state_dict={'weight': torch.zeros(10_000)}), file)
        file.write_bytes(file.read_bytes()[:20_000])
    else:
        file.write_bytes(content)
    message = message_of(test.main, CONFIG, file, '--work-dir', tmp_path / 'work',
                         *data_options(data, experiment_name=tmp_path.name))
    assert f'the checkpoint {file}' in message and expected in message


def test_image_demo(data: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / 'a.pth'
    torch.save({}, checkpoint)
    command = [CONFIG, checkpoint, '--out-dir', tmp_path / 'out', '--device', 'cpu']
    assert 'absent.jpg does not exist' in message_of(demo.main, tmp_path / 'absent.jpg', *command)
    (tmp_path / 'empty').mkdir()
    assert 'holds no images' in message_of(demo.main, tmp_path / 'empty', *command)


def test_debug_shows_the_traceback(data: Path, tmp_path: Path) -> None:
    (data / 'coco/annotations/instances_train.json').unlink()
    with pytest.raises(RuntimeError, match='the annotation file'):
        train.main([CONFIG, '--work-dir', str(tmp_path / 'work'), '--debug', *data_options(data)])
