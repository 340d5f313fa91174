# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What can be found wrong before a run.

A check raises `UserError`, whose message is all that the user needs: what is wrong, where, and
what to do.
"""

from __future__ import annotations

import os
import re
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Optional

import torch
from mmengine.config import Config
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Size, Tensor, nn

OUR_TYPES = ('ChannelLN', 'DCNv4', 'FlashInternImage', 'InternImage')
PICTURE_ENDINGS = ('.png', '.jpg', '.jpeg', '.pdf', '.svg')  # that matplotlib writes


class UserError(RuntimeError):
    """An error in what the user gave; its message needs no traceback beside it."""


def check_folder(folder: str, option: str) -> None:
    """Creates `folder` and writes a file into it.

    Args:
        folder: where results go.
        option: of the command line, which names it.

    Raises:
        UserError: one of the two is not possible.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix='.write-test-'):
            pass
    except OSError as error:
        raise UserError(f'cannot write to the folder {folder}: {error.strerror}. '
                        f'Choose another one with {option}.') from error


def check_file(file: str, option: str, endings: Iterable[str]) -> None:
    """Refuses a file to write that has a wrong ending, is a folder, or lies where none can be.

    Raises:
        UserError: names the option.
    """
    if not file.lower().endswith(tuple(endings)):
        raise UserError(f'{option} must end in {", ".join(endings)}, got {file}')
    if os.path.isdir(file):
        raise UserError(f'{option} must be a file, got the folder {file}')
    check_folder(os.path.dirname(file) or '.', option)


def _is_local(path: object) -> bool:
    """Whether `path` names something on this machine's disks."""
    return isinstance(path, (str, Path)) and str(path) != '' and '://' not in str(path)


def check_checkpoint(path: Optional[str], source: str) -> None:
    """Refuses a local file that is absent or was not written to its end.

    Args:
        path: of a checkpoint; None and addresses of other machines pass.
        source: where the path comes from, for the message.

    Raises:
        UserError: no such file, or not the whole file.
    """
    if path is None or not _is_local(path):
        return
    if not os.path.isfile(path):
        raise UserError(f'{source}: the checkpoint {path} does not exist or is no file.')
    with open(path, 'rb') as stream:
        is_zip = stream.read(4) == b'PK\x03\x04'
    if is_zip and not zipfile.is_zipfile(path):
        raise UserError(f'{source}: the checkpoint {path} is truncated; its end is missing.')


def read_shapes(path: str) -> dict[str, Size]:
    """Name and shape of the weights in a checkpoint, the prefix `module.` taken off.

    Args:
        path: as mmengine's loader takes it.

    Raises:
        UserError: the file holds something else.
    """
    content = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    weights = content.get('state_dict', content) if isinstance(content, dict) else content
    if not isinstance(weights, dict):
        raise UserError(f'the checkpoint {path} must hold a dict of weights, got a '
                        f'{type(weights).__name__}.')
    return {re.sub(r'^module\.', '', str(name)): value.shape for name, value in weights.items()
            if isinstance(value, Tensor)}


def check_weights(model: nn.Module, shapes: dict[str, Size], path: str) -> None:
    """Refuses a checkpoint of another model, where mmengine goes on with random weights.

    Args:
        model: built, also inside a wrapper.
        shapes: of :func:`read_shapes`.
        path: of the checkpoint, for the message.

    Raises:
        UserError: under a tenth of the weights of the model are in the file, in their shape.
    """
    inner: Any = model
    while is_model_wrapper(inner) or isinstance(inner, BaseTTAModel):
        inner = inner.module
    own = inner.state_dict()
    matching = sum(shapes.get(name) == value.shape for name, value in own.items())
    if 10 * matching < len(own):
        raise UserError(
            f'the checkpoint {path} is not of this model: of the {len(own)} weights of the model '
            f'{matching} are in the file, which holds {len(shapes)}. Published weights are '
            'converted by tools/model_converters/convert_checkpoint.py, those of BEVFormer v2 by '
            'bevformer_v2.py beside it.')


def check_device(name: str) -> None:
    """Refuses a device that PyTorch does not know, or a GPU that it does not see.

    Raises:
        UserError: names the device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'--device must be cpu, cuda or cuda:<number>, got {name}') from error
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f'--device {name}: torch {torch.__version__} sees '
                        f'{torch.cuda.device_count()} GPU(s).')


def walk(node: Any, path: str = '') -> Iterator[tuple[str, dict]]:
    """All dicts in a config, with the dotted way to each."""
    if isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            yield from walk(value, f'{path}.{key}' if path else str(key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from walk(value, f'{path}.{index}')


def check_pretrained(cfg: Config) -> None:
    """Refuses a model whose `Pretrained` file is absent.

    Raises:
        UserError: names the file and the entry of the config.
    """
    for path, node in walk(cfg.get('model', {}), 'model'):
        checkpoint = node.get('checkpoint')
        if node.get('type') == 'Pretrained' and _is_local(checkpoint) \
                and not re.match(r'\w+:', str(checkpoint)) and not os.path.isfile(str(checkpoint)):
            raise UserError(
                f'{path}.checkpoint: the pre-trained weights {checkpoint} do not exist. Download '
                f'them there, or start from scratch with --cfg-options {path}=None.')


def missing_import(cfg: Config) -> Optional[str]:
    """A hint when the config uses a class of this package without importing the package."""
    imports = (cfg.get('custom_imports') or {}).get('imports', [])
    imports = [imports] if isinstance(imports, str) else imports
    if any(name.split('.')[0] == 'mmdcnv4' for name in imports):
        return None
    used = sorted({node['type'] for _, node in walk(cfg.get('model', {}), 'model')
                   if node.get('type') in OUR_TYPES})
    if not used:
        return None
    return (f'the config uses {", ".join(used)} but does not import mmdcnv4. The tools of this '
            'package do that themselves; all other programs need the line\n'
            "    custom_imports = dict(imports=['mmdcnv4'], allow_failed_imports=False)")


def _leaf_datasets(node: Any, path: str) -> Iterator[tuple[str, dict]]:
    """Data sets that read files, below wrappers such as RepeatDataset and ConcatDataset."""
    if isinstance(node, dict) and isinstance(node.get('dataset'), dict):
        yield from _leaf_datasets(node['dataset'], f'{path}.dataset')
    elif isinstance(node, dict) and isinstance(node.get('datasets'), (list, tuple)):
        for index, inner in enumerate(node['datasets']):
            yield from _leaf_datasets(inner, f'{path}.datasets.{index}')
    elif isinstance(node, dict):
        yield path, node


def _dataset_paths(dataset: dict) -> Iterator[tuple[str, str]]:
    """(entry, path) of the annotation file and of the folders that a data set reads."""
    root = dataset.get('data_root') or ''
    if dataset.get('ann_file'):
        yield 'ann_file', os.path.join(root, dataset['ann_file'])
    for key, prefix in (dataset.get('data_prefix') or {}).items():
        if isinstance(prefix, str):
            yield f'data_prefix.{key}', os.path.join(root, prefix)


def annotation_files(cfg: Config) -> Iterator[tuple[str, str]]:
    """(entry of the config, path) of every annotation file and data folder."""
    for loader in ('train_dataloader', 'val_dataloader', 'test_dataloader'):
        for path, dataset in _leaf_datasets((cfg.get(loader) or {}).get('dataset'),
                                            f'{loader}.dataset'):
            for key, file in _dataset_paths(dataset):
                yield f'{path}.{key}', file
    for name in ('val_evaluator', 'test_evaluator'):
        for path, metric in walk(cfg.get(name) or {}, name):
            if isinstance(metric.get('ann_file'), str):
                yield f'{path}.ann_file', metric['ann_file']


def check_datasets(cfg: Config, splits: tuple[str, ...]) -> None:
    """Refuses a config whose annotation files or image folders are absent.

    Args:
        cfg: the config.
        splits: of 'train', 'val', 'test', those that the run reads.

    Raises:
        UserError: names the file and the entry of the config.
    """
    for entry, file in annotation_files(cfg):
        split = entry.split('_')[0]
        if split not in splits or not _is_local(file):
            continue
        is_annotation = entry.endswith('ann_file')
        if is_annotation and os.path.isdir(file):
            raise UserError(f'{entry}: the annotation file {file} is a folder.')
        if os.path.exists(file):
            continue
        what = 'annotation file' if is_annotation else 'data folder'
        hint = (' Draw it with: python tools/dataset_converters/drawn_scenes.py '
                'data/drawn_scenes.' if 'drawn_scenes' in file else
                ' Put the data set there, or set data_root and the paths below it with '
                '--cfg-options.')
        raise UserError(f'{entry}: the {what} {file} does not exist (working directory '
                        f'{os.getcwd()}).{hint}')


def check_nuscenes_metric(cfg: Config, splits: tuple[str, ...]) -> None:
    """Refuses a metric of nuScenes without what its devkit reads, before hours of training.

    Args:
        cfg: the config.
        splits: of 'train', 'val', 'test', those that the run reads.

    Raises:
        UserError: names the folder and the entry of the config.
    """
    for split in splits:
        for path, metric in walk(cfg.get(f'{split}_evaluator') or {}, f'{split}_evaluator'):
            root = str(metric.get('data_root') or '')
            if str(metric.get('type')).split('.')[-1] != 'NuScenesMetric' \
                    or metric.get('format_only') or not _is_local(root):
                continue
            for name in ('maps', 'v1.0-*'):
                if not any(folder.is_dir() for folder in Path(root).glob(name)):
                    raise UserError(
                        f'{path}.data_root: the metric of nuScenes reads {Path(root, name)}, which '
                        f'does not exist (working directory {os.getcwd()}). Unpack the archives of '
                        'nuScenes there, "Metadata" holds the maps; or write predictions without '
                        f'scores, with --cfg-options {path}.format_only=True '
                        f'{path}.jsonfile_prefix=predictions.')
