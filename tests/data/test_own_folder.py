# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What is read from a folder of the user, and the sizes derived from it."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config

from mmdcnv4.datasets import own_configs
from mmdcnv4.datasets.own_folder import read_coco_folder, read_semantic_folder, split_of
from mmdcnv4.errors import InvalidValue, MissingFile

CONFIGS = Path(__file__).parents[2] / 'configs'
RETINANET = 'real_images/retinanet_flash-intern-image-mini_fpn_1xb4-36e_bccd-320x240.py'
MASK_RCNN = 'quick_start/mask-rcnn_flash-intern-image-mini_fpn_1xb2-6e_drawn-scenes-160x160.py'
UPERNET = 'real_images/upernet_flash-intern-image-mini_1xb4-4k_camvid-360x480.py'


def write_coco(root: Path, layout: str = 'annotations/instances_{split}.json',
               images: str = 'images', **changes) -> None:
    """Two images of 640 x 480 per split; a bird of 64 x 64 and fish of 160 x 40 pixels."""
    for split in ('train', 'val'):
        folder = root / images.format(split=split)
        folder.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(folder / f'{split}.png'), np.zeros((48, 64, 3), np.uint8))
        content = dict(
            images=[dict(id=number, file_name=f'{split}.png', width=640, height=480)
                    for number in range(2)],
            categories=[dict(id=0, name='nothing'), dict(id=7, name='fish'),
                        dict(id=3, name='bird')],
            annotations=[
                dict(dict(id=number, image_id=0, category_id=category, bbox=box, iscrowd=0, area=1),
                     **changes)
                for number, (category, box) in enumerate([
                    (3, [10, 10, 64, 64]), (7, [50, 60, 160, 40]), (7, [90, 60, 160, 40])])])
        file = root / layout.format(split=split)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))


@pytest.mark.parametrize('layout, images', [
    ('annotations/instances_{split}.json', 'images'),
    ('annotations/instances_{split}2017.json', '{split}2017'),
    ('{split}.json', 'images/{split}'),
    ('{split}/_annotations.coco.json', '{split}')])
def test_coco_layouts(tmp_path: Path, layout: str, images: str) -> None:
    write_coco(tmp_path, layout, images)
    folder = read_coco_folder(tmp_path)
    assert folder.splits['train'] == (layout.format(split='train'), images.format(split='train'))
    assert folder.splits['val'] == (layout.format(split='val'), images.format(split='val'))
    assert folder.classes == ('bird', 'fish')  # by id, and only those that occur
    assert not folder.has_masks
    assert (folder.num_images, folder.image_size, folder.max_objects) == (1, (640, 480), 3)
    assert folder.small_size == pytest.approx(64 / 640)  # the bird; fish have sqrt(6400) = 80
    np.testing.assert_allclose(folder.aspect_ratios, [1, 0.25, 0.25])


def test_split_of_a_path() -> None:
    assert split_of(Path('annotations/instances_val2017.json')) == 'val'
    assert split_of(Path('valid/_annotations.coco.json')) == 'val'
    assert split_of(Path('annotations/my-train.json')) == 'train'
    assert split_of(Path('annotations/training_day.json')) == 'train'
    assert split_of(Path('annotations/trains.json')) is None


def test_sizes_of_a_detector(tmp_path: Path) -> None:
    write_coco(tmp_path)
    folder = read_coco_folder(tmp_path)
    base = Config.fromfile(CONFIGS / RETINANET)
    entries = own_configs.detector_entries(folder, base, iterations=12)
    assert own_configs.detector_side(folder) == 192  # birds of 20 pixels want 200
    pipeline = entries['train_dataloader']['dataset']['pipeline']
    assert [step['scale'] for step in pipeline if step['type'] == 'Resize'] == [(192, 192)]
    assert base.train_dataloader.dataset.pipeline[2].scale == (320, 240)  # untouched
    generator = entries['model']['bbox_head']['anchor_generator']
    assert generator['octave_base_scale'] == 2  # 19.2 pixels at stride 8
    assert entries['train_cfg'] == dict(max_epochs=12, val_interval=2)
    assert entries['test_dataloader']['dataset']['ann_file'].endswith('instances_val.json')
    merged = Config(base.to_dict())
    merged.merge_from_dict(entries)
    assert merged.val_dataloader.dataset.metainfo['classes'] == ('bird', 'fish')


def test_masks_get_a_mask_rcnn(tmp_path: Path) -> None:
    write_coco(tmp_path, segmentation=[[10, 10, 74, 10, 74, 74]])
    folder = read_coco_folder(tmp_path)
    assert folder.has_masks
    model = own_configs.detector_entries(folder, Config.fromfile(CONFIGS / MASK_RCNN))['model']
    assert model['rpn_head']['anchor_generator'] == dict(scales=[5], ratios=[0.5, 1.0, 2.0])
    assert model['roi_head']['mask_head'] == dict(num_classes=2)


@pytest.mark.parametrize('spoil, error, message', [
    (lambda root: (root / 'annotations/instances_val.json').unlink(), MissingFile,
     r'has no COCO file with boxes for the split val: expected for example annotations/instances_'),
    (lambda root: (root / 'images/train.png').unlink(), MissingFile,
     r'the image train\.png of .*instances_train\.json is in none of .*images'),
    (lambda root: write_coco(root, 'annotations/other_{split}.json', 'images'), InvalidValue,
     r'several COCO files for the split train: .*instances_train.*other_train.*Leave one'),
    (lambda root: write_coco(root, bbox=[0, 0, 0, 5]), InvalidValue, 'no object to train on')])
def test_coco_folders_that_cannot_be_used(tmp_path: Path, spoil, error, message) -> None:
    write_coco(tmp_path)
    with pytest.raises(error, match=message):
        spoil(tmp_path)
        read_coco_folder(tmp_path)


# ------------------------------------------------------------------------------ label maps


def write_label_maps(root: Path, labels: np.ndarray, suffix: str = '.png') -> None:
    for split in ('train', 'val'):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(root / f'images/{split}/a.jpg'), np.zeros((*labels.shape[:2], 3), np.uint8))
        cv2.imwrite(str(root / f'annotations/{split}/a{suffix}'), labels)


def test_label_maps(tmp_path: Path) -> None:
    labels = np.zeros((40, 60), np.uint8)
    labels[:10], labels[-4:] = 255, 2
    write_label_maps(tmp_path, labels)
    folder = read_semantic_folder(tmp_path)
    assert folder.classes == ('class 0', 'class 1', 'class 2')
    assert (folder.suffixes, folder.image_size) == (('.jpg', '.png'), (60, 40))
    np.testing.assert_allclose(folder.frequencies, [26 / 30, 0, 4 / 30])
    (tmp_path / 'classes.txt').write_text('sea\nland\nsky\n')
    folder = read_semantic_folder(tmp_path)
    assert folder.classes == ('sea', 'land', 'sky')
    entries = own_configs.segmentor_entries(folder, Config.fromfile(CONFIGS / UPERNET), 100)
    assert entries['crop_size'] == (32, 64)
    # the median of 26/30 and 4/30 is 1/2; a class that does not occur weighs 1
    assert entries['model']['decode_head']['loss_decode']['class_weight'] == [
        round(float(np.sqrt(15 / 26)), 2), 1.0, round(float(np.sqrt(15 / 4)), 2)]
    assert entries['train_cfg'] == dict(max_iters=100, val_interval=17)


@pytest.mark.parametrize('labels, names, message', [
    (np.full((4, 4, 3), 1, np.uint8), None, r'must be an image of shape \(H, W\) of uint8'),
    (np.full((4, 4), 1000, np.uint16), None, r'got \(4, 4\), uint16'),
    (np.full((4, 4), 255, np.uint8), None, 'have no label but 255'),
    (np.full((4, 4), 2, np.uint8), ['a', 'b'], 'have the labels 2, and there are names for 2')])
def test_label_maps_that_cannot_be_used(tmp_path: Path, labels, names, message) -> None:
    write_label_maps(tmp_path, labels)
    with pytest.raises(InvalidValue, match=message):
        read_semantic_folder(tmp_path, names)


def test_label_map_without_its_image(tmp_path: Path) -> None:
    write_label_maps(tmp_path, np.zeros((4, 4), np.uint8))
    (tmp_path / 'images/train/a.jpg').rename(tmp_path / 'images/train/b.jpg')
    with pytest.raises(MissingFile, match=r'a\.png has no image .*a\.jpg'):
        read_semantic_folder(tmp_path)
    with pytest.raises(MissingFile, match='expected images/train and annotations/train'):
        read_semantic_folder(tmp_path / 'images')
