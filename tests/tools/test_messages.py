# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Faults in what the user gives: each is provoked, and ends in one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmcv.cnn import build_conv_layer
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from torch import nn

from helpers.tool_runner import TINY, data_options, load_tool
from mmdcnv4.checks.samples import CheckedPipeline
from mmdcnv4.checks.weights import check_match
from mmdcnv4.cli import preflight
from mmdcnv4.errors import UserError, find_user_error
from mmdcnv4.models.backbones import FlashInternImage

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


def test_pipeline_that_drops_every_sample(data: Path, tmp_path: Path) -> None:
    with pytest.raises(Exception, match='Cannot find valid image after 3'):
        run_train(data, tmp_path / 'work', **{
            'train_dataloader.dataset.max_refetch': 3,
            'train_dataloader.dataset.pipeline.2.type': 'FilterAnnotations',
            'train_dataloader.dataset.pipeline.2.min_gt_bbox_wh': '(999,999)'})


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
    assert f'cannot write to the folder {tmp_path}/file/work: Not a directory' in message
    assert '--work-dir' in message
    if Path('/proc').is_dir():  # as good as a read-only disk, for root too
        assert 'cannot write to the folder /proc/work' in train_message(
            data, Path('/proc/work'))


def test_missing_pretrained_weights(data: Path, tmp_path: Path) -> None:
    message = train_message(data, tmp_path / 'work', **{
        'model.backbone.init_cfg.type': 'Pretrained',
        'model.backbone.init_cfg.checkpoint': 'absent.pth'})
    assert 'model.backbone.init_cfg.checkpoint: the pre-trained weights absent.pth' in message


def run_train(data: Path, work_dir: Path, **entries: object) -> None:
    options = data_options(data, experiment_name=work_dir.parent.name, **entries)
    train.main([CONFIG, '--work-dir', str(work_dir), *options])


def test_unknown_type_keeps_the_message_of_mmengine(data: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match='FPNN is not in the .*model registry'):
        run_train(data, tmp_path / 'work', **{'model.neck.type': 'FPNN'})


def test_a_bug_is_not_blamed_on_the_data(data: Path, tmp_path: Path,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    """Its text names what data errors name, and an image of the dataset is broken."""
    (data / 'coco/images/val/000001.jpg').write_bytes(b'')

    def fail(*arguments: object) -> None:
        raise AttributeError("'NoneType' object has no attribute 'shape'")

    monkeypatch.setattr(FlashInternImage, 'forward', fail)
    with pytest.raises(AttributeError, match="^'NoneType' object") as caught:
        run_train(data, tmp_path / 'work')
    assert not getattr(caught.value, '__notes__', [])
    log = next((tmp_path / 'work').glob('*/*.log')).read_text()
    assert 'Traceback' in log and "AttributeError: 'NoneType' object" in log


def test_a_user_error_of_the_run_is_in_the_log_with_its_traceback(data: Path,
                                                                  tmp_path: Path) -> None:
    (data / 'coco/images/train/000003.jpg').write_bytes(b'')
    train_message(data, tmp_path / 'work')
    log = next((tmp_path / 'work').glob('*/*.log')).read_text()
    assert 'Traceback' in log and 'empty or corrupt' in log and '000003.jpg' in log


@pytest.mark.parametrize(('entry', 'expected'), [
    ('norm_eval', 'FlashInternImage has no argument norm_eval. If it comes from an inherited'),
    ('frozen_stages', 'FlashInternImage: frozen_stages must be '),
])
def test_bad_argument_of_the_backbone(data: Path, tmp_path: Path, entry: str,
                                      expected: str) -> None:
    message = train_message(data, tmp_path / 'work', **{f'model.backbone.{entry}': 'yes'})
    assert message.startswith(f'error: {expected}')


def test_dcn_of_an_inherited_config() -> None:
    """What mmengine makes of the errors of a layer deep in a backbone."""
    for options, expected in ((dict(deform_groups=1), 'DCNv4: deform_groups must not be given'),
                              (dict(groups_=1), 'DCNv4 has no argument groups_. ')):
        with pytest.raises(TypeError) as caught:
            build_conv_layer(dict(type='DCNv4', **options), 16, 16, 3)
        assert str(find_user_error(caught.value)).startswith(expected)


def test_missing_checkpoint(data: Path, tmp_path: Path) -> None:
    absent = tmp_path / 'absent.pth'
    assert f'the checkpoint {absent} does not exist' in message_of(
        test.main, CONFIG, absent, '--work-dir', tmp_path / 'work', *data_options(data))
    assert '--resume: the checkpoint' in message_of(
        train.main, CONFIG, '--resume', absent, '--work-dir', tmp_path / 'work',
        *data_options(data))


@pytest.mark.parametrize(('content', 'expected'), [
    (b'no zip file', 'is not a checkpoint'),
    ('half', 'is truncated'),
    ('code', 'could run code, so it is refused'),
    ('list', 'must hold a dict of weights, got a list'),
    ('foreign', '0 are in the file, which holds 1. '),
])
def test_bad_checkpoint(data: Path, tmp_path: Path, content: object, expected: str) -> None:
    file = tmp_path / 'bad.pth'
    if content == 'code':
        torch.save(dict(state_dict={}, extra=np.random.default_rng(0)), file)
    elif content == 'list':
        torch.save([1, 2], file)
    elif content == 'foreign':
        torch.save(dict(state_dict={'foo.bar': torch.zeros(2)}), file)
    elif content == 'half':
        torch.save(dict(state_dict={'weight': torch.zeros(10_000)}), file)
        file.write_bytes(file.read_bytes()[:20_000])
    else:
        file.write_bytes(content)
    message = message_of(test.main, CONFIG, file, '--work-dir', tmp_path / 'work',
                         *data_options(data, experiment_name=tmp_path.name))
    assert f'the checkpoint {file}' in message and expected in message


def test_weights_of_another_model(data: Path, tmp_path: Path) -> None:
    """The names are right and the shapes are not; a wrapper and new classes change nothing where
    a training starts from the weights."""
    model, file = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 6)), tmp_path / 'a.pth'
    weights = {f'module.{name}': value for name, value in model.state_dict().items()}
    torch.save(weights, file)
    shapes = preflight.read_shapes(str(file))
    check_match(nn.DataParallel(model), shapes, str(file))
    check_match(nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 7)), shapes, str(file),
                            must_match=False)
    with pytest.raises(UserError, match=f'{file} .* of the 4 .* 0 are .* holds 4.*conv'):
        check_match(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3)), shapes, str(file))
    assert 'of this model' in train_message(data, tmp_path / 'work', load_from=file)


def test_checkpoint_of_other_classes(data: Path, tmp_path: Path) -> None:
    """Tested and resumed: mmdet would go on with a random layer, and with a mAP near zero."""
    cfg = Config.fromfile(CONFIG)
    cfg.model.roi_head.bbox_head.num_classes += 1
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model)
    file = tmp_path / 'a.pth'
    torch.save(dict(state_dict=model.state_dict(), meta=dict(cfg=cfg.pretty_text)), file)
    options = data_options(data, experiment_name=tmp_path.name)
    for main, how in ((test.main, [file]), (train.main, ['--resume', file])):
        message = message_of(main, CONFIG, *how, '--work-dir', tmp_path / 'work', *options)
        assert 'roi_head.bbox_head.fc_cls.weight' in message
        classes = cfg.model.roi_head.bbox_head.num_classes
        assert (f'model.roi_head.bbox_head.num_classes: {classes} in the checkpoint, '
                f'{classes - 1} in the config') in message


def test_targets_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    (tmp_path / 'folder.pkl').mkdir()
    torch.save({}, tmp_path / 'a.pth')
    command = [CONFIG, tmp_path / 'a.pth', '--work-dir', tmp_path / 'work', *data_options(data)]
    for option, target in (('--out', 'file/a.pkl'), ('--out', 'folder.pkl'),
                           ('--show-dir', 'file/pictures')):
        message = message_of(test.main, *command, option, tmp_path / target)
        assert option in message and str((tmp_path / target).parent) in message


def test_annotation_file_that_is_a_folder(data: Path, tmp_path: Path) -> None:
    message = train_message(data, tmp_path / 'work', **{
        'train_dataloader.dataset.ann_file': 'annotations'})
    assert f'dataset.ann_file: the annotation file {data}/coco/annotations is a folder' in message


def test_only_the_files_of_the_sample_that_fails_are_looked_at(tmp_path: Path) -> None:
    good, gray, picture = tmp_path / 'a.png', tmp_path / 'b.png', tmp_path / 'c.gif'
    cv2.imwrite(str(good), np.zeros((1, 1, 3), np.uint8))
    cv2.imwrite(str(gray), np.zeros((4, 4), np.uint16))
    Image.new('L', (4, 4)).save(picture)
    (tmp_path / 'broken.png').touch()
    cv2.imwrite(str(tmp_path / 'half.jpg'), np.eye(64, dtype=np.uint8) * 255)
    content = (tmp_path / 'half.jpg').read_bytes()
    (tmp_path / 'half.jpg').write_bytes(content[:len(content) // 2])

    def fail(sample: dict) -> None:
        raise ZeroDivisionError('bug')

    pipeline = CheckedPipeline(Compose([fail]))
    for sample in ({}, dict(img_path=str(good)), dict(img_path=str(gray)),
                   dict(img_path='s3://bucket/a.png'),
                   dict(lidar_points=dict(lidar_path=str(tmp_path / 'a.bin')))):
        with pytest.raises(ZeroDivisionError):
            pipeline(sample)
    for sample, message in (
            (dict(images=dict(CAM_FRONT=dict(img_path=str(tmp_path / 'absent.png')))),
             'absent.png does not exist'),
            (dict(img_path=str(good), seg_map_path=str(tmp_path / 'broken.png')),
             'broken.png: the file is empty or corrupt'),
            (dict(img_path=str(tmp_path / 'half.jpg')), 'half.jpg: the file is empty or corrupt'),
            (dict(img_path=str(picture)), 'c.gif: it is a GIF file, which OpenCV does not read')):
        with pytest.raises(UserError, match=message) as caught:
            pipeline(sample)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_image_demo(data: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / 'a.pth'
    torch.save({}, checkpoint)
    command = [CONFIG, checkpoint, '--out-dir', tmp_path / 'out', '--device', 'cpu']
    assert 'absent.jpg does not exist' in message_of(demo.main, tmp_path / 'absent.jpg', *command)
    image = data / 'coco/images/train/000003.jpg'
    assert '--device must be' in message_of(demo.main, image, *command[:-1], 'gpu')
    assert '0 are in the file, which holds 0' in message_of(demo.main, image, *command)
    (tmp_path / 'empty').mkdir()
    assert 'holds no images' in message_of(demo.main, tmp_path / 'empty', *command)


def test_debug_shows_the_traceback(data: Path, tmp_path: Path) -> None:
    (data / 'coco/annotations/instances_train.json').unlink()
    with pytest.raises(RuntimeError, match='the annotation file'):
        train.main([CONFIG, '--work-dir', str(tmp_path / 'work'), '--debug', *data_options(data)])
