# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The generated dataset: repeatable, valid, balanced, and the same in both layouts."""

from __future__ import annotations

import filecmp
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

from helpers.tool_runner import REPOSITORY, run_command
from mmdcnv4.datasets import drawn_scenes
from mmdcnv4.datasets.drawn_scenes import CLASSES, SceneConfig, draw_scene, write_drawn_scenes


@pytest.fixture(scope='module')
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_drawn_scenes(tmp_path_factory.mktemp('drawn') / 'scenes', 40, 10, seed=3)


def all_files(root: Path) -> list[Path]:
    return sorted(file.relative_to(root) for file in root.rglob('*') if file.is_file())


def test_same_arguments_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    again = tmp_path / 'again'
    run_command('python', REPOSITORY / 'tools/dataset_converters/drawn_scenes.py', again,
                '--num-train', 40, '--num-val', 10, '--seed', 3)
    assert all_files(again) == all_files(root)
    _, different, errors = filecmp.cmpfiles(root, again, all_files(root), shallow=False)
    assert not different and not errors


def test_another_seed_and_the_other_split_give_other_scenes(root: Path, tmp_path: Path) -> None:
    other = write_drawn_scenes(tmp_path / 'other', 1, 1, seed=4)
    names = [folder / 'coco/images' / split / '000001.jpg'
             for folder in (root, other) for split in ('train', 'val')]
    assert len({name.read_bytes() for name in names}) == 4


@pytest.mark.parametrize(('split', 'count'), [('train', 40), ('val', 10)])
def test_coco_annotations_are_valid(root: Path, split: str, count: int) -> None:
    coco = COCO(str(root / f'coco/annotations/instances_{split}.json'))
    assert len(coco.imgs) == count
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    assert all(coco.getAnnIds(imgIds=image_id) for image_id in coco.imgs)
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        rows, columns = np.nonzero(mask)
        x, y, width, height = annotation['bbox']
        assert annotation['area'] == mask.sum() >= 90
        assert (x, y) == (columns.min(), rows.min())
        assert (x + width, y + height) == (columns.max() + 1, rows.max() + 1)


@pytest.mark.parametrize(('split', 'ade_split'), [('train', 'training'), ('val', 'validation')])
def test_label_maps_agree_with_the_masks(root: Path, split: str, ade_split: str) -> None:
    coco = COCO(str(root / f'coco/annotations/instances_{split}.json'))
    for image_id, image in coco.imgs.items():
        expected = np.zeros((160, 160), dtype=int)
        for annotation in coco.loadAnns(coco.getAnnIds(imgIds=image_id)):
            mask = coco.annToMask(annotation).astype(bool)
            assert not expected[mask].any(), 'visible parts must not overlap'
            expected[mask] = annotation['category_id']
        stem = Path(image['file_name']).stem
        labels = cv2.imread(str(root / f'ade/annotations/{ade_split}/{stem}.png'),
                            cv2.IMREAD_UNCHANGED)
        assert labels.dtype == np.uint8
        np.testing.assert_array_equal(labels, expected)
        pictures = [root / folder / f'{stem}.jpg' for folder in
                    (f'coco/images/{split}', f'ade/images/{ade_split}')]
        assert pictures[0].read_bytes() == pictures[1].read_bytes()
        assert cv2.imread(str(pictures[0])).shape == (160, 160, 3)


def test_classes_are_balanced_and_objects_overlap(root: Path) -> None:
    coco = COCO(str(root / 'coco/annotations/instances_train.json'))
    counts = Counter(annotation['category_id'] for annotation in coco.anns.values())
    assert len(counts) == len(CLASSES)
    assert max(counts.values()) - min(counts.values()) <= 3
    touching = 0
    for image_id in coco.imgs:
        masks = [coco.annToMask(a) for a in coco.loadAnns(coco.getAnnIds(imgIds=image_id))]
        grown = [cv2.dilate(mask, np.ones((3, 3), np.uint8)) for mask in masks]
        touching += sum(map(np.sum, masks)) != 0 and np.sum(grown, axis=0).max() > 1
    assert touching >= len(coco.imgs) // 4


@pytest.mark.parametrize(('name', 'share'), [
    ('disk', np.pi / 4), ('square', 1.0), ('triangle', 3 * 3 ** 0.5 / 4 / 2.25),
    ('ring', np.pi / 4 * 0.75)])
def test_masks_have_the_area_of_their_shape(name: str, share: float) -> None:
    """Area over that of a square: with the same corners, around the circle, of the height."""
    label, radius = CLASSES.index(name), 40.0
    distance = drawn_scenes._signed_distance(label, 160, np.array([80.2, 79.7]), radius, 0.3)
    side = {'square': radius * 2 ** 0.5, 'triangle': 1.5 * radius}.get(name, 2 * radius)
    assert (distance < 0).sum() == pytest.approx(share * side ** 2, rel=0.01)


def test_colour_says_nothing_about_the_class() -> None:
    """With the same random numbers another class has another outline and the same colour."""
    scenes = [draw_scene(np.random.default_rng(7), iter([label]), SceneConfig(max_objects=1))
              for label in range(len(CLASSES))]
    core = np.logical_and.reduce([scene.instances[0].mask for scene in scenes
                                  if CLASSES[scene.instances[0].label] != 'ring'])
    core = cv2.erode(core.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    assert core.any()
    for scene in scenes:
        if CLASSES[scene.instances[0].label] != 'ring':
            np.testing.assert_array_equal(scene.image[core], scenes[0].image[core])
    outlines = {scene.instances[0].mask.tobytes() for scene in scenes}
    assert len(outlines) == len(CLASSES)


def test_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='num_train and num_val must be >= 1, got 0 and 5'):
        write_drawn_scenes(tmp_path / 'a', 0, 5)
    with pytest.raises(ValueError, match='size must be >= 64'):
        SceneConfig(size=32)
    with pytest.raises(ValueError, match='max_objects must be >= 1'):
        SceneConfig(max_objects=0)
    (tmp_path / 'full').mkdir()
    (tmp_path / 'full/file').touch()
    with pytest.raises(FileExistsError, match='must not exist or be empty'):
        write_drawn_scenes(tmp_path / 'full', 1, 1)
    assert not (tmp_path / 'a').exists()


def test_nothing_is_left_when_drawing_fails(tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError('disk full')

    monkeypatch.setattr(drawn_scenes, '_write_image', fail)
    with pytest.raises(OSError, match='disk full'):
        write_drawn_scenes(tmp_path / 'scenes', 1, 1)
    assert list(tmp_path.iterdir()) == []
