# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What MMEngine's Runner completes, the tools complete; what it fails on, they refuse in words.

The exceptions, which it trains on to no end, are in tests/cli/test_coco_files.py.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope
from mmengine.runner import Runner
from mmengine.runner import runner as runner_module

from helpers.parity import FakeLMDB, World, outcome
from helpers.tool_runner import TINY
from mmdcnv4.cli.runner import build_runner
from mmdcnv4.errors import UserError

READ_BY = {'train': ('train', 'val'), 'test': ('test',)}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without what takes seconds at the start of each run: asking compilers, laying out configs."""
    monkeypatch.setattr(runner_module, 'collect_env', dict)
    monkeypatch.setattr(Config, 'pretty_text', property(repr))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / 'data')


@pytest.fixture
def segments(tmp_path: Path) -> World:
    pytest.importorskip('mmseg', reason='mmseg is not installed')
    return World(tmp_path / 'data', 'mmseg')


def check_parity(world: World, method: str = 'train', words: tuple[str, ...] = ()) -> None:
    """Runs the world twice.

    Args:
        world: files and config.
        method: of the Runner.
        words: of our message where the plain Runner fails; empty where it completes.
    """
    world.write()
    work_dir = world.root.parent / 'work'
    try:
        expected = outcome(Runner.from_cfg(world.config(work_dir)), method)
    except Exception as error:
        assert words, f'the plain Runner fails: {error!r}'
        with pytest.raises(UserError) as caught:
            build_runner(world.config(work_dir), READ_BY[method])
        for word in words:
            assert word in str(caught.value)
        return
    assert not words, 'the plain Runner completes'
    assert outcome(build_runner(world.config(work_dir), READ_BY[method]), method) == expected


# ----------------------------------------------------------------------------- annotation files


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


ALL, TRAIN, VAL = ('train', 'val', 'test'), ('train',), ('val',)
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


def test_a_class_of_mine_that_filters_otherwise(world: World) -> None:
    world.set('train', type='mmengine.FilterOfMine')
    world.change('annotations', TRAIN, category_id=9)
    world.set('train', pipeline__1__with_mask=False)
    check_parity(world)


# ---------------------------------------------------------------------------- files and folders


class LoadImageOfMine(LoadImageFromFile):
    """Stands for a transform of the user, which may read from anywhere."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def transform(self, results: dict) -> dict:
        results['img_path'] = str(Path(self.folder, Path(results['img_path']).name))
        return super().transform(results)


class DatasetOfMine(CocoDataset):
    """Stands for a data set of the user with other names of the fields (LVIS has `coco_url`)."""

    def parse_data_info(self, raw_data_info: dict) -> dict:
        image = raw_data_info['raw_img_info']
        return dict(img_path=str(Path(self.data_prefix['img'], image['url'])), height=1, width=1,
                    img_id=image['img_id'], instances=[])


class FolderOfMine(CocoDataset):
    """Stands for a data set of the user whose `ann_file` is a folder, one file per picture."""

    def load_data_list(self) -> list[dict]:
        return [dict(img_path=str(Path(self.data_prefix['img'], f'{file.stem}.png')), instances=[],
                     img_id=int(file.stem), height=16, width=16)
                for file in sorted(Path(self.ann_file).iterdir())]


class FilterOfMine(CocoDataset):
    """Stands for a data set of the user that keeps images without objects."""

    def filter_data(self) -> list[dict]:
        return self.data_list


for registry, kind in ((TRANSFORMS, LoadImageOfMine), (DATASETS, DatasetOfMine),
                       (DATASETS, FolderOfMine), (DATASETS, FilterOfMine)):
    registry.register_module(module=kind, force=True)


def load_from_archive(world: World, patch: pytest.MonkeyPatch) -> None:
    load = dict(type='LoadImageFromFile', backend_args=world.archive('images/*'))
    for split in ALL:
        world.set(split, **{'pipeline__0': load})


def load_from_lmdb(world: World, patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, 'lmdb', FakeLMDB())
    for split in ALL:
        world.set(split, data_prefix__img='not/here/', pipeline__0__backend_args=dict(
            backend='lmdb', db_path=str(world.root / 'images')))


def load_by_mine(world: World, patch: pytest.MonkeyPatch) -> None:
    load = dict(type='mmengine.LoadImageOfMine', folder=str(world.root / 'images'))
    for split in ALL:
        world.set(split, data_prefix__img='not/here/', **{'pipeline__0': load})


def all_from_archive(world: World, patch: pytest.MonkeyPatch) -> None:
    args = world.archive('images/*', '*.json')
    for split in ALL:
        world.set(split, backend_args=args, pipeline__0__backend_args=args)
    for split in ('val', 'test'):
        world.options[f'{split}_evaluator.backend_args'] = args


@pytest.mark.parametrize('method', ['train', 'test'])
@pytest.mark.parametrize('edit', [load_from_archive, load_from_lmdb, load_by_mine,
                                  all_from_archive])
def test_files_of_other_backends(edit: Callable, method: str, world: World,
                                 monkeypatch: pytest.MonkeyPatch) -> None:
    edit(world, monkeypatch)
    check_parity(world, method)


def test_a_fault_is_not_blamed_on_a_file_of_another_backend(world: World,
                                                            monkeypatch: pytest.MonkeyPatch
                                                            ) -> None:
    load_from_archive(world, monkeypatch)
    world.set('train', pipeline__1__type='NoSuchFieldOfMine')
    TRANSFORMS.register_module('NoSuchFieldOfMine', force=True,
                               module=lambda **options: lambda results: results['no such field'])
    world.write()
    runner = build_runner(world.config(world.root / 'work'), ('train', 'val'))
    with pytest.raises(KeyError, match='no such field'):
        runner.train()


@pytest.mark.parametrize('method', ['train', 'test'])
def test_a_prefix_that_nothing_reads(method: str, world: World) -> None:
    for split in ALL:
        world.set(split, data_prefix__seg='not/here/', data_prefix__depth='nor/here/')
    check_parity(world, method)


def test_label_maps_that_nothing_reads(segments: World) -> None:
    segments.set('test', data_prefix__seg_map_path='not/here/', pipeline=[
        dict(type='LoadImageFromFile'), dict(type='PackSegInputs')])
    segments.options['test_evaluator.format_only'] = True
    segments.options['test_evaluator.output_dir'] = str(segments.root / 'results')
    check_parity(segments, 'test')


@pytest.mark.parametrize('method', ['train', 'test'])
@pytest.mark.parametrize('ann_file', ['', 'maps', 'names.txt'])
def test_segmentation(ann_file: str, method: str, segments: World) -> None:
    (segments.root / 'names.txt').write_text('1\n2\n')
    for split in ALL:
        segments.set(split, ann_file=ann_file)
    check_parity(segments, method)


def test_a_folder_in_place_of_the_annotation_file(world: World) -> None:
    world.set('train', ann_file='maps')
    check_parity(world, words=('train_dataloader.dataset.ann_file', 'maps is a folder'))
    world.set('train', type='mmengine.FolderOfMine', filter_cfg=None)
    world.set('train', pipeline__1__with_mask=False)
    check_parity(world)


def test_a_data_set_of_another_layout(world: World) -> None:
    for image in world.content['train']['images']:
        image['url'] = image.pop('file_name')
    check_parity(world, words=('train.json', 'images[0]', 'file_name'))
    world.set('train', type='mmengine.DatasetOfMine', filter_cfg=None)
    check_parity(world)


def test_panoptic_files(world: World) -> None:
    """Entries of segments in the place of objects."""
    world.content['train']['annotations'] = [
        dict(image_id=number, file_name=f'{number}.png',
             segments_info=[dict(id=1, category_id=3, area=36, bbox=[2, 2, 6, 6], iscrowd=0)])
        for number in (1, 2)]
    for category in world.content['train']['categories']:
        category['isthing'] = 1
    world.set('train', type='CocoPanopticDataset', data_prefix__seg='maps/',
              metainfo=dict(classes=('cat', 'dog'), thing_classes=('cat', 'dog'),
                            stuff_classes=()),
              pipeline=[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')])
    check_parity(world)


# ---------------------------------------------------------------------------------- checkpoints


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv('HOME', str(tmp_path))
    torch.save(dict(state_dict=dict(weight=torch.full((1,), 5.0))), tmp_path / 'x.pth')
    return tmp_path


@pytest.mark.parametrize('method', ['train', 'test'])
@pytest.mark.parametrize(('file', 'words'), [
    ('~/x.pth', ()), ('~/absent.pth', ('load_from', 'absent.pth does not exist'))])
def test_load_from_the_home(file: str, words: tuple[str, ...], method: str, world: World,
                            home: Path) -> None:
    world.options['load_from'] = file
    check_parity(world, method, words)


@pytest.mark.parametrize(('file', 'method', 'load_from', 'words'), [
    ('~/x.pth', 'train', None, ()),
    ('~/absent.pth', 'train', None, ('model.init_cfg.checkpoint', 'absent.pth do not exist',
                                     '--cfg-options model.init_cfg=None')),
    ('~/absent.pth', 'train', '~/x.pth', ('model.init_cfg.checkpoint', 'absent.pth')),
    ('~/absent.pth', 'test', None, ()),
    ('~/absent.pth', 'test', '~/x.pth', ())])
def test_pretrained_weights(file: str, method: str, load_from: str, words: tuple[str, ...],
                            world: World, home: Path) -> None:
    world.options.update({'model.init_cfg': dict(type='Pretrained', checkpoint=file),
                          'load_from': load_from})
    check_parity(world, method, words)


# ------------------------------------------------------------------------------ kinds of configs


ENTRIES = {
    'no checkpoints': {'default_hooks.checkpoint': None},
    'no validation': {'val_cfg': None, 'val_dataloader': None, 'val_evaluator': None},
    'no test': {'test_cfg': None, 'test_dataloader': None, 'test_evaluator': None},
    'no hooks': {'default_hooks': None, 'custom_hooks': None},
    'no imports': {'custom_imports': dict(imports=None)},
    'iterations': {'train_cfg': dict(_delete_=True, by_epoch=False, max_iters=1, val_interval=1),
                   'train_dataloader.sampler': dict(type='InfiniteSampler', shuffle=False)},
    'two metrics': {'val_evaluator': [dict(type='CocoMetric', metric='proposal_fast',
                                           ann_file='FOLDER/val.json'),
                                      dict(type='DumpDetResults', out_file_path='FOLDER/a.pkl')]},
    'wrapped data': {'train_dataloader.dataset': dict(_delete_=True, type='RepeatDataset',
                                                      times=2, dataset='OWN')},
    'joined data': {'train_dataloader.dataset': dict(_delete_=True, type='ConcatDataset',
                                                     datasets=['OWN', 'OWN'])},
}


def fill(value: Any, world: World, own: Any) -> Any:
    """Puts the folder, and the data set of the training, where an entry names them."""
    if isinstance(value, dict):
        return {key: fill(item, world, own) for key, item in value.items()}
    if isinstance(value, list):
        return [fill(item, world, own) for item in value]
    if value == 'OWN':
        return copy.deepcopy(own)
    return value.replace('FOLDER', str(world.root)) if isinstance(value, str) else value


@pytest.mark.parametrize('name', ENTRIES)
def test_entries(name: str, world: World) -> None:
    own = world.config(world.root / 'work').train_dataloader.dataset.to_dict()
    world.options.update(fill(ENTRIES[name], world, own))
    check_parity(world)


@pytest.mark.parametrize('method', ['train', 'test'])
def test_no_scope(method: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict())  # of earlier runs
    world.options['default_scope'] = None
    for split in ALL:
        world.set(split, type='mmdet.CocoDataset', pipeline__1__type='mmdet.LoadAnnotations',
                  pipeline__2__type='mmdet.PackDetInputs')
        if split != 'train':
            world.options[f'{split}_evaluator.type'] = 'mmdet.CocoMetric'
    check_parity(world, method)


@pytest.mark.parametrize('method', ['train', 'test'])
def test_pure_python(method: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DefaultScope, '_instance_dict', OrderedDict())
    world.base = Config.fromfile(TINY / 'pure_python.py')
    # the tools draw other random numbers
    world.options.update({'model.bbox_head.num_classes': 2, 'model.backbone.drop_path_rate': 0.0})
    for split in ALL:
        world.set(split, data_root=str(world.root), ann_file=f'{split}.json',
                  data_prefix__img='images/', metainfo__classes=('cat', 'dog'))
        if split != 'train':
            world.options[f'{split}_evaluator.ann_file'] = str(world.root / f'{split}.json')
    check_parity(world, method)
