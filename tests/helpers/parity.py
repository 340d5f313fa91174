# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Two pictures, a config around them, and a model that costs nothing: for runs of milliseconds.

Registered in MMEngine by import: the model `FittedNumber` and the file backend `test_zip`.
"""

from __future__ import annotations

import copy
import itertools
import json
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Optional, Union

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.fileio import BaseStorageBackend, register_backend
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from torch import Tensor, nn

from mmdcnv4.cli.runner import build_runner
from mmdcnv4.errors import UserError

SIZE = 16
CLASSES = ('cat', 'dog')
SPLITS = ('train', 'val', 'test')
READ_BY = {'train': ('train', 'val'), 'test': ('test',)}  # method: the splits of its data
_numbers = itertools.count()


@MODELS.register_module(force=True)
class FittedNumber(BaseModel):
    """One weight; sees one cat in every picture, and one label everywhere."""

    def __init__(self, init_cfg: Optional[dict] = None) -> None:
        super().__init__(init_cfg=init_cfg)
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, inputs: list[Tensor], data_samples: Optional[list] = None,
                mode: str = 'tensor') -> Any:
        """The loss, or the samples with predictions."""
        if mode == 'loss':
            mean = torch.stack([image.float().mean() for image in inputs]).mean() / 255
            return dict(loss=(self.weight - mean).square().sum())
        for image, sample in zip(inputs, data_samples or []):
            mask = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
            mask[:, 2:8, 2:8] = True
            sample.pred_instances = InstanceData(
                bboxes=torch.tensor([[2.0, 2.0, 8.0, 8.0]]), scores=torch.tensor([0.9]),
                labels=torch.tensor([0]), masks=mask)
            sample.pred_sem_seg = PixelData(data=mask.long())
        return data_samples


class ZipBackend(BaseStorageBackend):
    """Files in an archive, named by their path below a folder."""

    def __init__(self, archive: str, folder: str) -> None:
        self.archive, self.folder = archive, folder

    def get(self, filepath: Union[str, Path]) -> bytes:
        """The content of a file."""
        with zipfile.ZipFile(self.archive) as files:
            return files.read(str(Path(filepath).relative_to(self.folder)))

    def get_text(self, filepath: Union[str, Path], encoding: str = 'utf-8') -> str:
        """The content of a text."""
        return self.get(filepath).decode(encoding)

    @contextmanager
    def get_local_path(self, filepath: Union[str, Path]) -> Iterator[str]:
        """A copy outside of the archive."""
        file = Path(self.archive).with_name(f'copy_{Path(filepath).name}')
        file.write_bytes(self.get(filepath))
        yield str(file)
        file.unlink()


register_backend('test_zip', ZipBackend, force=True)


class FakeLMDB:
    """Stands in for the module lmdb, which is not among the tested versions: files as values."""

    def open(self, folder: str, **options: Any) -> FakeLMDB:
        """The environment, and the transaction, too."""
        self.folder = Path(folder)
        return self

    @contextmanager
    def begin(self, write: bool) -> Iterator[FakeLMDB]:
        """A transaction."""
        yield self

    def get(self, key: bytes) -> bytes:
        """The value of a key: here the path that the files had."""
        return (self.folder / Path(key.decode()).name).read_bytes()

    def close(self) -> None:
        """Nothing to do."""


def coco_content() -> dict[str, list[dict]]:
    """A COCO file of two pictures with a cat and a dog each."""
    return dict(
        images=[dict(id=number, file_name=f'{number}.png', width=SIZE, height=SIZE)
                for number in (1, 2)],
        categories=[dict(id=3 + index, name=name) for index, name in enumerate(CLASSES)],
        annotations=[dict(id=number, image_id=1 + number // 2, category_id=3 + number % 2,
                          area=36.0, bbox=[2, 2, 6, 6], iscrowd=0,
                          segmentation=[[2, 2, 8, 2, 8, 8, 2, 8]]) for number in range(4)])


class World:
    """Files of a user and the config of a run over them; a test changes both.

    Attributes:
        root: folder of the pictures (`images`), label maps (`maps`) and annotation files.
        content: of the annotation file of each split.
        options: entries that the config gets, by their dotted names.
        base: a config of another kind, which gets them.
    """

    def __init__(self, root: Path, scope: str = 'mmdet') -> None:
        self.root, self.scope = root, scope
        self.content = {split: coco_content() for split in SPLITS}
        self.options: dict[str, Any] = {}
        self.base: Optional[Config] = None
        self._packed: tuple[str, ...] = ()
        for folder in ('images', 'maps'):
            (root / folder).mkdir(parents=True)
        for number in (1, 2):
            cv2.imwrite(str(root / f'images/{number}.png'),
                        np.full((SIZE, SIZE, 3), 60 * number, np.uint8))
            cv2.imwrite(str(root / f'maps/{number}.png'), np.eye(SIZE, dtype=np.uint8))

    def change(self, what: str, splits: tuple[str, ...] = SPLITS, drop: tuple[str, ...] = (),
               only: Optional[int] = None, **fields: Any) -> None:
        """Sets or drops fields of the entries of a list in the annotation files."""
        for split in splits:
            entries = self.content[split][what]
            for entry in entries if only is None else [entries[only]]:
                entry.update(copy.deepcopy(fields))
                for field in drop:
                    entry.pop(field, None)

    def set(self, split: str, **entries: Any) -> None:
        """Sets entries of the data set of a split; double underlines stand for dots."""
        for key, value in entries.items():
            self.options[f'{split}_dataloader.dataset.{key.replace("__", ".")}'] = value

    def archive(self, *patterns: str) -> dict:
        """Has files put into an archive; the `backend_args` that read it."""
        self._packed = patterns
        return dict(backend='test_zip', archive=str(self.root / 'data.zip'), folder=str(self.root))

    def write(self) -> None:
        """Writes the annotation files, and the archive."""
        for split, content in self.content.items():
            (self.root / f'{split}.json').write_text(json.dumps(content))
        with zipfile.ZipFile(self.root / 'data.zip', 'a') as archive:
            for file in sorted(path for name in self._packed for path in self.root.glob(name)):
                archive.write(file, file.relative_to(self.root))
                file.unlink()
                if not any(file.parent.iterdir()):
                    file.parent.rmdir()

    def config(self, work_dir: Path) -> Config:
        """The config of a run that is told apart from others in this process."""
        number = next(_numbers)
        cfg = copy.deepcopy(self.base) if self.base is not None else Config(dict(
            default_scope=self.scope, model=dict(type='mmengine.FittedNumber'),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            train_cfg=dict(by_epoch=True, max_epochs=1), val_cfg={}, test_cfg={},
            default_hooks=dict(checkpoint=dict(type='CheckpointHook')),
            **_data(self.root, self.scope)))
        cfg.merge_from_dict(dict(work_dir=str(work_dir / str(number)), randomness=dict(seed=0),
                                 experiment_name=f'parity_{number}'))
        cfg.merge_from_dict(copy.deepcopy(self.options))
        return cfg


def _data(root: Path, scope: str) -> dict[str, Any]:
    """Loaders and metrics of all splits."""
    entries: dict[str, Any] = {}
    for split in SPLITS:
        if scope == 'mmdet':
            dataset = dict(type='CocoDataset', ann_file=f'{split}.json',
                           data_prefix=dict(img='images/'),
                           pipeline=[dict(type='LoadImageFromFile'),
                                     dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
                                     dict(type='PackDetInputs')])
            metric = dict(type='CocoMetric', ann_file=str(root / f'{split}.json'),
                          metric=['bbox', 'segm'])
        else:
            dataset = dict(type='BaseSegDataset', img_suffix='.png', seg_map_suffix='.png',
                           data_prefix=dict(img_path='images/', seg_map_path='maps/'),
                           pipeline=[dict(type='LoadImageFromFile'),
                                     dict(type='LoadAnnotations'), dict(type='PackSegInputs')])
            metric = dict(type='IoUMetric', iou_metrics=['mIoU'])
        # serialised data would begin with a full garbage collection, a second each
        dataset.update(data_root=str(root), metainfo=dict(classes=CLASSES),
                       test_mode=split != 'train', serialize_data=False)
        if split == 'train' and scope == 'mmdet':
            dataset['filter_cfg'] = dict(filter_empty_gt=True, min_size=1)
        entries[f'{split}_dataloader'] = dict(
            batch_size=2, num_workers=0, dataset=dataset,
            sampler=dict(type='DefaultSampler', shuffle=False))
        if split != 'train':
            entries[f'{split}_evaluator'] = metric
    return entries


def outcome(runner: Any, method: str) -> dict[str, Any]:
    """Runs a runner; its weights and metrics at the end, as numbers."""
    metrics = getattr(runner, method)()
    scalars = runner.message_hub.log_scalars
    found = {name: history.current() for name, history in scalars.items()
             if name.startswith('val/') and not name.endswith('time')}
    found.update(metrics if isinstance(metrics, dict) else {})
    return {**found, **{name: value.tolist() for name, value in runner.model.state_dict().items()}}


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
