# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Annotation files that MMEngine's Runner completes a run with, the tools take; others they refuse.

The exceptions, which it trains on to no end, are in tests/cli/test_coco_files.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from mmdet.datasets import CocoDataset
from mmengine.registry import DATASETS

from helpers.parity import World, check_parity

ALL, TRAIN, VAL = ('train', 'val', 'test'), ('train',), ('val',)
pytestmark = pytest.mark.usefixtures('quick_runs')


@DATASETS.register_module(force=True)
class AllOfMine(CocoDataset):
    """Stands for a data set of the user that reads no objects."""

    def parse_data_info(self, raw_data_info: dict) -> dict:
        return super().parse_data_info(dict(raw_data_info, raw_ann_info=[]))


@DATASETS.register_module(force=True)
class FilterOfMine(CocoDataset):
    """Stands for a data set of the user that keeps images without objects."""

    def filter_data(self) -> list[dict]:
        return self.data_list


class Change(NamedTuple):
    """Of COCO files.

    Attributes:
        edit: makes it.
        method: of the Runner.
        words: see :func:`check_parity`.
    """

    edit: Callable[[World], Any]
    method: str = 'train'
    words: tuple[str, ...] = ()


def boxes_alone(world: World, **changes: Any) -> None:
    """A detector without masks."""
    for split in ('train', 'val', 'test'):
        world.set(split, pipeline=[dict(type='LoadImageFromFile'),
                                   dict(type='LoadAnnotations', with_bbox=True),
                                   dict(type='PackDetInputs')])
    for split in ('val', 'test'):
        world.options[f'{split}_evaluator.metric'] = 'bbox'
    if changes:
        world.change('annotations', **changes)


def no_labels(world: World, annotations: Any = None) -> None:
    """A test split for a server that evaluates."""
    del world.content['test']['annotations']
    if annotations is not None:
        world.content['test']['annotations'] = annotations
    world.set('test', pipeline=[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')])
    world.options['test_evaluator.format_only'] = True
    world.options['test_evaluator.outfile_prefix'] = str(world.root / 'results')


def dummies(world: World) -> None:
    no_labels(world, [dict(id=1, image_id=1, category_id=3, bbox=[0, 0, 0, 0], area=0)])


CHANGES = {
    'as they should be': Change(lambda world: None),
    'tested': Change(lambda world: None, 'test'),
    'no labels': Change(no_labels, 'test'),
    'an empty list of labels': Change(lambda world: no_labels(world, []), 'test'),
    'labels for form': Change(dummies, 'test'),
    'no labels, size unknown': Change(lambda world: (
        no_labels(world), world.change('images', ('test',), height=0, width=0)), 'test'),
    'no area': Change(lambda world: world.change('annotations', TRAIN, ('area',), only=2), words=(
        'train.json', 'annotations[2]', 'area', 'width * height of the box')),
    'no area where a box is thin': Change(lambda world: world.change(
        'annotations', TRAIN, ('area',), only=2, bbox=[2, 2, 0.5, 6]), words=(
            'train.json', 'annotations[2]', 'area')),
    'no area where a box is outside': Change(lambda world: world.change(
        'annotations', TRAIN, ('area',), only=2, bbox=[40, 2, 6, 6])),
    'no area in the metric': Change(
        lambda world: world.change('annotations', VAL, ('area',), only=1),
        words=('val.json', 'annotations[1]', 'area')),
    'no iscrowd': Change(lambda world: world.change('annotations', TRAIN, ('iscrowd',))),
    'no iscrowd in the metric': Change(
        lambda world: world.change('annotations', VAL, ('iscrowd',), only=3),
        words=('val.json', 'annotations[3]', 'iscrowd', '0, or 1')),
    'no iscrowd, not of an image': Change(lambda world: world.change(
        'annotations', VAL, ('iscrowd',), only=3, image_id=77)),
    'no segmentation': Change(
        lambda world: world.change('annotations', TRAIN, ('segmentation',), only=1),
        words=('train.json', 'annotations[1]', 'segmentation', 'without a mask head')),
    'an empty segmentation': Change(
        lambda world: world.change('annotations', TRAIN, only=1, segmentation=[]),
        words=('train.json', 'annotations[1]', 'segmentation')),
    'no segmentation in the metric': Change(
        lambda world: world.change('annotations', VAL, ('segmentation',), only=0, ignore=1),
        words=('val.json', 'annotations[0]', 'segmentation', 'metric=["bbox"]')),
    'no segmentation, boxes alone': Change(lambda world: boxes_alone(
        world, drop=('segmentation',))),
    'no segmentation, of another class': Change(lambda world: (
        world.change('annotations', drop=('segmentation',), only=1),
        [world.set(split, metainfo__classes=('cat',)) for split in ALL])),
    'classes in a file': Change(lambda world: (
        (world.root / 'classes.txt').write_text('cat\n'),
        world.change('annotations', drop=('segmentation',), only=1),
        [world.set(split, metainfo__classes=str(world.root / 'classes.txt')) for split in ALL])),
    'no height': Change(lambda world: world.change('images', drop=('height',), only=1), words=(
        'images[1]', 'height', 'size of the image in pixels')),
    'a box that is null': Change(
        lambda world: world.change('annotations', TRAIN, only=2, bbox=None),
        words=('train.json', 'annotations[2]', 'bbox', '[x, y, width, height]')),
    'a box that is null and ignored': Change(
        lambda world: world.change('annotations', TRAIN, only=2, bbox=None, ignore=1)),
    'a box that is null and ignored, in the metric': Change(
        lambda world: world.change('annotations', VAL, only=2, bbox=None, ignore=1),
        words=('val.json', 'annotations[2]', 'bbox')),
    'a box that is null, not of an image': Change(
        lambda world: world.change('annotations', TRAIN, only=2, bbox=None, image_id=77)),
    'an image that is listed twice': Change(lambda world: [
        content['images'].append(dict(content['images'][0]))
        for content in world.content.values()]),
    'an object that is listed twice': Change(lambda world: world.content['train'][
        'annotations'].append(world.content['train']['annotations'][0]), words=(
            'train.json', 'annotations[4]', 'unique')),
    'an image without objects': Change(lambda world: world.change(
        'annotations', TRAIN, image_id=1)),
    'a training without objects': Change(
        lambda world: world.change('annotations', TRAIN, category_id=9),
        words=('train.json', 'no image left', "['cat', 'dog']")),
}


@pytest.mark.parametrize('name', CHANGES)
def test_annotation_files(name: str, world: World) -> None:
    change = CHANGES[name]
    change.edit(world)
    check_parity(world, change.method, change.words)


# What every child of CocoDataset reads.
SHARED = ('as they should be', 'tested', 'no area', 'no area where a box is outside', 'no height',
          'no segmentation', 'no segmentation, boxes alone', 'a box that is null',
          'a box that is null and ignored', 'an object that is listed twice',
          'an image without objects', 'no labels, size unknown', 'no iscrowd')
CHILDREN = ('CityscapesDataset', 'Objects365V1Dataset', 'Objects365V2Dataset', 'LVISV05Dataset',
            'LVISV1Dataset')


def use(world: World, kind: str) -> None:
    """Makes the data sets those of a class."""
    if kind.startswith('LVIS'):
        pytest.importorskip('lvis', reason='lvis is not among the tested versions')
    for split in ALL:
        world.set(split, type=kind)
        if kind == 'LVISV1Dataset':
            for image in world.content[split]['images']:
                image['coco_url'] = image.pop('file_name')


@pytest.mark.parametrize('kind', CHILDREN)
@pytest.mark.parametrize('name', SHARED)
def test_annotation_files_of_other_classes(name: str, kind: str, world: World) -> None:
    change = CHANGES[name]
    change.edit(world)
    use(world, kind)
    words = change.words
    if kind.startswith('LVIS') and name.startswith('no labels'):
        words = ('test.json', "no list 'annotations'", 'add an empty one')
    check_parity(world, change.method, words)


def test_cityscapes_without_an_object_that_is_no_crowd(world: World) -> None:
    use(world, 'CityscapesDataset')
    world.change('annotations', TRAIN, only=1, iscrowd=1)
    check_parity(world)
    world.change('annotations', TRAIN, iscrowd=1)
    check_parity(world, words=('train.json', 'no image left', 'iscrowd must be 0'))
    world.set('train', filter_cfg=None)
    check_parity(world)


def test_objects365_reads_the_last_folder_and_leaves_images_out(world: World) -> None:
    from mmdet.datasets.objects365 import objv2_ignore_list
    use(world, 'Objects365V2Dataset')
    folder = world.root / 'images/patch3'
    folder.mkdir()
    (world.root / 'images/1.png').rename(folder / '1.png')
    for split in ALL:
        world.content[split]['images'][0]['file_name'] = '/not/here/patch3/1.png'
    check_parity(world)
    world.content['train']['images'].append(
        dict(id=3, file_name=f'/not/here/{objv2_ignore_list[0]}'))
    world.content['train']['annotations'].append(dict(id=9, image_id=3, category_id=3))
    check_parity(world)
    world.content['train']['images'][-1]['file_name'] = 'patch3/1.png'
    check_parity(world, words=('train.json', 'images[2]', 'width'))


@pytest.mark.parametrize('kind', ['LVISV05Dataset', 'LVISV1Dataset'])
def test_lvis_reads_no_names_and_another_field(kind: str, world: World) -> None:
    use(world, kind)
    world.change('categories', TRAIN, ('name',))
    check_parity(world)
    field = 'coco_url' if kind == 'LVISV1Dataset' else 'file_name'
    world.change('images', TRAIN, (field,), only=1)
    check_parity(world, words=('train.json', 'images[1]', field))


@pytest.mark.parametrize('what, field', [
    ('images', 'neg_category_ids'), ('images', 'not_exhaustive_category_ids'),
    ('categories', 'frequency'), ('annotations', 'area'), ('annotations', 'bbox')])
def test_the_metric_of_lvis(what: str, field: str, world: World,
                            monkeypatch: pytest.MonkeyPatch) -> None:
    use(world, 'LVISV05Dataset')
    monkeypatch.setattr(np, 'float', float, raising=False)  # lvis 0.5.3 names it
    world.change('images', neg_category_ids=[], not_exhaustive_category_ids=[])
    world.change('categories', frequency='c')
    for split in ('val', 'test'):
        world.options[f'{split}_evaluator.type'] = 'LVISMetric'
    check_parity(world)
    world.change(what, VAL, (field,), only=1)
    check_parity(world, words=('val.json', f'{what}[1]', field))


@pytest.mark.parametrize('field, change, words', [
    ('iscrowd', dict(category_id=9), ('val.json', 'annotations[1]', 'iscrowd')),
    ('iscrowd', dict(ignore=1), ()), ('bbox', dict(iscrowd=1), ()),
    ('bbox', dict(category_id=9), ('val.json', 'annotations[1]', 'bbox')), ('area', dict(), ()),
    ('bbox', dict(image_id=77), ())])
def test_the_fast_metric_of_proposals(field: str, change: dict, words: tuple[str, ...],
                                      world: World) -> None:
    world.set('val', pipeline=[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')],
              type='mmengine.AllOfMine')
    world.options['val_evaluator.metric'] = 'proposal_fast'
    for number in (1, 3):  # as many boxes in each picture; else mmdet fails with numpy >= 1.24
        world.change('annotations', VAL, (field,), only=number, **change)
    check_parity(world, words=words)


def test_a_class_of_mine_that_filters_otherwise(world: World) -> None:
    world.set('train', type='mmengine.FilterOfMine')
    world.change('annotations', TRAIN, category_id=9)
    world.set('train', pipeline__1__with_mask=False)
    check_parity(world)
