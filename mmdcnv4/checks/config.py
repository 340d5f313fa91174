# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Files and folders that a config names, before a run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from mmengine.config import Config
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.fileio import list_from_file
from mmengine.registry import DATASETS, METRICS, MODELS, TRANSFORMS, Registry

from ..errors import InvalidValue, MissingFile
from .coco import check_coco_dataset, check_coco_metric, check_lvis_metric
from .layouts import layout_of

LIBRARIES = ('mmdet', 'mmdet3d', 'mmpretrain', 'mmseg')
SPLITS = ('train', 'val', 'test')
_READERS = {  # entry of data_prefix: beginning of the names of the transforms that read from it
    'img': 'LoadImage', 'img_path': 'LoadImage', 'seg_map_path': 'LoadAnnotations',
    'pts': 'LoadPointsFromFile', 'sweeps': 'LoadPointsFromMultiSweeps'}
_CAMERA_READERS = ('LoadMultiView', 'LoadTemporalMultiView')
_PACKAGES = ('mmcv', 'mmdcnv4', 'mmengine', *LIBRARIES)  # whose transforms read what they say


def walk(node: Any, path: str = '') -> Iterator[tuple[str, dict]]:
    """All dicts in a config, with the dotted way to each."""
    if isinstance(node, dict):
        yield path, node
        for key, value in node.items():
            yield from walk(value, f'{path}.{key}' if path else str(key))
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from walk(value, f'{path}.{index}')


def type_of(node: Any) -> Any:
    """The type in a dict of a config: a string, or the class in a pure-Python config; or None."""
    kind = node.get('type') if isinstance(node, dict) else None
    return kind.build() if isinstance(kind, (LazyAttr, LazyObject)) else kind


def type_name(node: Any) -> str:
    """The name of the type in a dict of a config, without a scope; '' where there is none."""
    kind = type_of(node)
    return str(getattr(kind, '__name__', kind or '')).split('.')[-1]


def default_scope(cfg: Config) -> Optional[str]:
    """The library of a config: its `default_scope`, else that of the class of the model.

    A class of another package belongs to the library of the first base that has one.
    """
    scope = cfg.get('default_scope')
    model = cfg.get('model') or {}
    kind = type_of(model)
    if scope is None and isinstance(kind, str) and kind.split('.')[0] in LIBRARIES:
        return kind.split('.')[0]
    if scope is None and isinstance(kind, str):
        kind = resolve(model, MODELS, None)
    if scope is not None or not isinstance(kind, type):
        return scope
    packages = (base.__module__.split('.')[0] for base in kind.__mro__)
    return next((package for package in packages if package in LIBRARIES), None)


def resolve(node: dict, registry: Registry, scope: Optional[str]) -> Optional[type]:
    """The class that a dict of a config names; None where the host library finds none."""
    kind = type_of(node)
    if not isinstance(kind, str):
        return kind if isinstance(kind, type) else None
    try:
        with registry.switch_scope_and_registry(scope) as found:
            return found.get(kind)
    except (ImportError, KeyError):  # building it says so, and better
        return None


def is_local(path: object) -> bool:
    """Whether `path` names something on this machine's disks."""
    return isinstance(path, (str, Path)) and str(path) != '' and '://' not in str(path)


def reads_local_disk(node: Mapping) -> bool:
    """Whether a dataset, transform or metric reads files without a backend of another kind.

    Args:
        node: its dict in the config, or its attributes.
    """
    backend = node.get('backend_args') or node.get('file_client_args')
    return not backend or set(backend) == {'backend'} and backend['backend'] in (
        'local', 'disk', 'LocalBackend', 'HardDiskBackend')


def is_known(kind: Optional[type]) -> bool:
    """Whether a class is known to read what it says: one of this package or the host libraries."""
    return kind is not None and kind.__module__.split('.')[0] in _PACKAGES


def _keeps(kind: Optional[type], name: str, *methods: str) -> bool:
    """Whether a class is the host's of this name, or derives from it and keeps its methods."""
    bases = () if kind is None else kind.__mro__
    host = next((base for base in bases if base.__name__ == name), None)
    return host is not None and all(getattr(kind, method) is getattr(host, method)
                                    for method in methods)


def _leaf_datasets(node: Any, path: str) -> Iterator[tuple[str, dict]]:
    """Datasets that read files, below wrappers such as RepeatDataset and ConcatDataset."""
    if isinstance(node, dict) and isinstance(node.get('dataset'), dict):
        yield from _leaf_datasets(node['dataset'], f'{path}.dataset')
    elif isinstance(node, dict) and isinstance(node.get('datasets'), (list, tuple)):
        for index, inner in enumerate(node['datasets']):
            yield from _leaf_datasets(inner, f'{path}.datasets.{index}')
    elif isinstance(node, dict):
        yield path, node


class DatasetEntry(NamedTuple):
    """A dataset of a config that reads files.

    Attributes:
        path: dotted way to it.
        node: its dict.
        scope: the library of the config.
        kind: its class; None where the host library finds none.
        classes: names that the config or the class gives; None where neither does.
    """

    path: str
    node: dict
    scope: Optional[str]
    kind: Optional[type]
    classes: Optional[Sequence[str]]

    def join(self, file: str) -> str:
        """A path of the dataset as mmengine joins it with `data_root`."""
        return os.path.join(self.node.get('data_root') or '', file)

    def transforms(self, beginning: str) -> list[dict]:
        """The transforms of the pipeline whose names begin so."""
        return [node for _, node in walk(self.node.get('pipeline') or [])
                if type_name(node).startswith(beginning)]

    def reads(self, beginning: str) -> bool:
        """Whether the pipeline has such transforms, and they read from the local disk.

        A transform of the user's own may read from anywhere.
        """
        found = self.transforms(beginning)
        return bool(found) and all(
            reads_local_disk(node) and is_known(resolve(node, TRANSFORMS, self.scope))
            for node in found)

    def ann_file(self) -> Optional[str]:
        """The annotation file, where it is one on the local disk."""
        file = self.node.get('ann_file')
        if not isinstance(file, str) or not file or not reads_local_disk(self.node):
            return None
        return self.join(file) if is_local(self.join(file)) else None

    def folders(self) -> Iterator[tuple[str, str]]:
        """(entry, folder) that a transform of the pipeline reads from."""
        for key, prefix in (self.node.get('data_prefix') or {}).items():
            readers = _CAMERA_READERS if key.startswith('CAM') else _READERS.get(key, '\0')
            if isinstance(prefix, str) and is_local(self.join(prefix)) and any(
                    map(self.reads, [readers] if isinstance(readers, str) else readers)):
                yield f'{self.path}.data_prefix.{key}', self.join(prefix)


def datasets_of(cfg: Config, splits: tuple[str, ...] = SPLITS) -> Iterator[DatasetEntry]:
    """The datasets of these splits."""
    scope = default_scope(cfg)
    for split in splits:
        loader = cfg.get(f'{split}_dataloader') or {}
        for path, node in _leaf_datasets(loader.get('dataset'), f'{split}_dataloader.dataset'):
            kind = resolve(node, DATASETS, scope)
            meta = {**getattr(kind, 'METAINFO', {}), **(node.get('metainfo') or {})}
            yield DatasetEntry(path, node, scope, kind, _class_names(meta.get('classes')))


def _class_names(classes: Any) -> Optional[Sequence[str]]:
    """The names, which may also stand in a file, as mmengine reads them."""
    if isinstance(classes, str) and os.path.isfile(classes):
        return list_from_file(classes)
    return classes if isinstance(classes, (list, tuple)) else None


def metrics_of(cfg: Config, splits: tuple[str, ...] = SPLITS
               ) -> Iterator[tuple[str, dict, Optional[type]]]:
    """(dotted way, dict, class) of the metrics of these splits."""
    for split in splits:
        for path, node in walk(cfg.get(f'{split}_evaluator') or {}, f'{split}_evaluator'):
            if 'type' in node:
                yield path, node, resolve(node, METRICS, default_scope(cfg))


def _advice(file: str) -> str:
    if 'drawn_scenes' in file:
        return ('Draw it with: python tools/dataset_converters/drawn_scenes.py data/drawn_scenes.')
    return ('Put the dataset there, or set data_root and the paths below it, in the config or with '
            '--cfg-options.')


def _must_exist(entry: str, what: str, file: str) -> None:
    if what != 'data folder' and os.path.isdir(file):
        raise InvalidValue(f'{entry}: the {what} {file} is a folder.')
    if not os.path.exists(file):
        raise MissingFile(f'{entry}: the {what} {file} does not exist (working directory '
                          f'{os.getcwd()}). {_advice(file)}')


def _check_dataset(dataset: DatasetEntry, split: str) -> None:
    file, kind = dataset.ann_file(), dataset.kind
    first: Optional[str] = None  # name of an image in the annotation file
    reads_lines, layout = _keeps(kind, 'BaseSegDataset', 'load_data_list'), layout_of(kind)
    if reads_lines and file is not None and os.path.isdir(file):
        file = None  # as mmsegmentation takes it
    if file is not None and (reads_lines or layout or _keeps(kind, 'CocoDataset', 'load_data_list')
                             or _keeps(kind, 'BaseDataset', 'load_data_list')):
        _must_exist(f'{dataset.path}.ann_file', 'annotation file', file)
        if reads_lines:
            with open(file, encoding='utf-8', errors='replace') as stream:
                first = stream.readline().strip()
        elif layout is not None:
            filters = (dataset.node.get('filter_cfg') or {}).get('filter_empty_gt', False)
            with_mask = any(node.get('with_mask') for node in dataset.transforms('LoadAnnotations'))
            trains = split == 'train'
            first = check_coco_dataset(file, dataset.classes, with_mask, trains,
                                       trains and filters and layout.drops_empty, layout)
    if first is not None and os.path.isabs(first):
        return  # the folders are not used
    if first is not None or reads_lines or _keeps(kind, 'Det3DDataset'):
        for entry, folder in dataset.folders():
            _must_exist(entry, 'data folder', folder)


def check_datasets(cfg: Config, splits: tuple[str, ...]) -> None:
    """Refuses a config whose annotation files or image folders are absent or cannot serve.

    What is read through another storage backend than the local disk is not looked at, nor what
    neither the pipeline nor the metric reads. COCO files are read and checked entry by entry; in a
    distributed run by the first process alone.

    Args:
        cfg: the config.
        splits: of 'train', 'val', 'test', those that the run reads.

    Raises:
        UserError: names the file and the entry of the config.
    """
    if int(os.environ.get('RANK') or 0) != 0:
        return
    for split in splits:
        classes: Optional[Sequence[str]] = None
        for dataset in datasets_of(cfg, (split,)):
            _check_dataset(dataset, split)
            classes = dataset.classes
        for path, metric, kind in metrics_of(cfg, (split,)):
            file = metric.get('ann_file')
            if isinstance(file, str) and is_local(file) and reads_local_disk(metric) \
                    and is_known(kind):
                _must_exist(f'{path}.ann_file', 'annotation file', file)
                if _keeps(kind, 'CocoMetric', 'process', 'compute_metrics'):
                    check_coco_metric(file, metric, classes)
                elif _keeps(kind, 'LVISMetric', 'process', 'compute_metrics'):
                    check_lvis_metric(file, metric)


def check_nuscenes_metric(cfg: Config, splits: tuple[str, ...]) -> None:
    """Refuses a metric of nuScenes without what its devkit reads, before hours of training.

    Args:
        cfg: the config.
        splits: of 'train', 'val', 'test', those that the run reads.

    Raises:
        UserError: names the folder and the entry of the config.
    """
    for path, metric, _ in metrics_of(cfg, splits):
        root = str(metric.get('data_root') or '')
        if type_name(metric) not in ('NuScenesMetric', 'NuScenesSplitMetric') \
                or metric.get('format_only') or not is_local(root) or not reads_local_disk(metric):
            continue
        for name in ('maps', 'v1.0-*'):
            if not any(folder.is_dir() for folder in Path(root).glob(name)):
                raise MissingFile(
                    f'{path}.data_root: the metric of nuScenes reads {Path(root, name)}, which '
                    f'does not exist (working directory {os.getcwd()}). Unpack the archives of '
                    'nuScenes there, "Metadata" holds the maps; or write predictions without '
                    f'scores, in the config or with --cfg-options {path}.format_only=True '
                    f'{path}.jsonfile_prefix=predictions.')


def check_pretrained(cfg: Config) -> None:
    """Refuses a model whose `Pretrained` file is absent.

    Raises:
        UserError: names the file and the entry of the config.
    """
    for path, node in walk(cfg.get('model', {}), 'model'):
        checkpoint = node.get('checkpoint')
        if type_name(node) in ('Pretrained', 'PretrainedInit') and is_local(checkpoint) \
                and not re.match(r'\w+:', str(checkpoint)) \
                and not os.path.isfile(os.path.expanduser(str(checkpoint))):
            raise MissingFile(
                f'{path}.checkpoint: the pre-trained weights {checkpoint} do not exist. Download '
                'them there, or start from scratch, in the config or with --cfg-options '
                f'{path}=None.')


def run_all(cfg: Config, splits: tuple[str, ...]) -> None:
    """All checks of this module.

    A training reads pre-trained weights of the model even where a checkpoint then replaces them, a
    test does not.

    Raises:
        UserError: of the first that fails.
    """
    check_datasets(cfg, splits)
    check_nuscenes_metric(cfg, splits)
    if 'train' in splits:
        check_pretrained(cfg)


