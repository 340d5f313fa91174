# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What MMEngine's Runner completes, the tools complete; what it fails on, they refuse in words.

Annotation files have a file of their own, test_parity_of_annotation_files.py.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope

from helpers.parity import FakeLMDB, World, check_parity
from helpers.tool_runner import TINY
from mmdcnv4.cli.runner import build_runner

ALL = ('train', 'val', 'test')
pytestmark = pytest.mark.usefixtures('quick_runs')


@pytest.fixture
def segments(tmp_path: Path) -> World:
    pytest.importorskip('mmseg', reason='mmseg is not installed')
    return World(tmp_path / 'data', 'mmseg')


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


for registry, kind in ((TRANSFORMS, LoadImageOfMine), (DATASETS, DatasetOfMine),
                       (DATASETS, FolderOfMine)):
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
