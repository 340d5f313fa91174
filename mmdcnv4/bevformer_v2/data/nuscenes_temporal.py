# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""nuScenes with neighbouring key frames, found by the links of the dataset and not by order."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional, Union

from mmdet3d.datasets import NuScenesDataset
from mmdet3d.registry import DATASETS

from ...errors import InvalidValue, MissingFile, MissingKey
from ...safe_files import load_infos

_INFO_VERSION = '1.1'
_CREATE = 'tools/dataset_converters/nuscenes.py'
# what model and pipeline read of each sample, and of each of its cameras
_SAMPLE_KEYS = ('ego2global', 'images', 'lidar_points', 'lidar_points.lidar2ego')
_CAMERA_KEYS = ('img_path', 'cam2img', 'lidar2cam')
_POINT_COUNTS = ('num_lidar_pts', 'num_radar_pts')  # of an instance; both may be missing


class Link(NamedTuple):
    """Where a sample stands: tokens, empty at the ends of a scene."""

    scene: str
    prev: str
    next: str


@DATASETS.register_module()
class NuScenesTemporalDataset(NuScenesDataset):
    """Samples with the infos of other key frames of the same scene.

    Each sample gets `frames`, `frame_infos` (the info of each frame, None where the scene has
    none), `classes` and `label_mapping` (label in the info file to label of the model).

    Args:
        data_root, ann_file: of the parent class; an info file of version 1.1.
        frames: offsets in key frames (2 Hz) in ascending order, 0 among them.
        scene_table: `sample.json` of the nuScenes tables, with the fields `token`, `scene_token`,
            `prev`, `next`; `<data_root>/<version>/sample.json` by default. Read only if `frames`
            has more than one entry and the info file holds no such fields.
        info_classes: names of the labels in the info file, in their order; those of nuScenes by
            default.
        kwargs: of the parent class, which refuses unknown ones.

    Raises:
        ValueError: `frames` is no such list, `metainfo.classes` names a class that
            `info_classes` has not, or the info file has another version.
        FileNotFoundError: links are needed and there is no table.
        KeyError: a sample lacks an entry; the message names both.

    Warns:
        Of what an info file lacks and is not needed: point counts, velocities, `cam_instances`.
    """

    def __init__(self, data_root: str, ann_file: str, *, frames: Sequence[int] = (0,),
                 scene_table: Optional[str] = None,
                 info_classes: Optional[Sequence[str]] = None, **kwargs: Any) -> None:
        self.frames = tuple(frames)
        if 0 not in self.frames or list(self.frames) != sorted(set(self.frames)):
            raise InvalidValue('NuScenesTemporalDataset: frames must be ascending and contain 0, '
                               f'got {self.frames}')
        if info_classes is not None:  # the parent maps labels by it
            self.METAINFO = {**NuScenesDataset.METAINFO, 'classes': tuple(info_classes)}
            kwargs['metainfo'] = {'classes': tuple(info_classes), **(kwargs.get('metainfo') or {})}
        self._check_classes((kwargs.get('metainfo') or {}).get('classes'))
        self.scene_table = scene_table
        self._missing: set[str] = set()  # what a warning was given for
        self._links: dict[str, Link] = {}
        self._index: dict[str, int] = {}
        super().__init__(data_root, ann_file, **kwargs)

    def _check_classes(self, classes: Union[Sequence[str], str, None]) -> None:
        known = self.METAINFO['classes']
        if classes is not None and (isinstance(classes, str) or not set(classes) <= set(known)):
            raise InvalidValue('NuScenesTemporalDataset: metainfo.classes must be a list of names '
                               f"out of {known}, ['car'] for a single one, got {classes!r}; for "
                               'names of your own set info_classes, the names of the info file')

    def load_data_list(self) -> list[dict]:
        """Reads the info file, without running what a pickle may hold, and checks its version."""
        infos = load_infos(self.ann_file)
        if not isinstance(infos, dict) or not isinstance(infos.get('data_list'), list) or \
                not isinstance(infos.get('metainfo'), dict):
            raise InvalidValue(
                f'NuScenesTemporalDataset: ann_file {self.ann_file} must hold data_list and '
                f'metainfo (version {_INFO_VERSION}); infos of mmdetection3d 0.x use other box '
                f'conventions, make new ones with {_CREATE}')
        for key, value in infos['metainfo'].items():  # what the config gives counts
            self._metainfo.setdefault(key, value)
        parsed = map(self.parse_data_info, infos['data_list'])
        data_list = [item for items in parsed
                     for item in (items if isinstance(items, list) else [items])]
        version = self.metainfo.get('info_version')
        if version != _INFO_VERSION:
            raise InvalidValue('NuScenesTemporalDataset: ann_file must have info_version '
                               f'{_INFO_VERSION!r}, got {version!r} in {self.ann_file}; make it '
                               f'with {_CREATE}')
        known, categories = tuple(self.METAINFO['classes']), self.metainfo.get('categories')
        if categories is not None:
            names = tuple(sorted(categories, key=lambda name: categories[name]))
            if names != known:
                raise InvalidValue('NuScenesTemporalDataset: info_classes must be the names of '
                                   f'the labels in {self.ann_file}, {names}, got {known}')
        return data_list

    def parse_data_info(self, info: dict) -> Union[list[dict], dict]:
        """Parses one sample as the parent does, after a look at what it holds."""
        required = [*_SAMPLE_KEYS]
        required += ['instances'] if self.load_eval_anns or not self.test_mode else []
        required += [f'images.{camera}.{key}' for camera in info.get('images') or ()
                     for key in _CAMERA_KEYS]
        for path in required:
            node: Any = info
            for key in path.split('.'):
                node = node.get(key) if isinstance(node, dict) else None
            if node is None:
                raise MissingKey(f'NuScenesTemporalDataset: ann_file {self.ann_file} must give '
                                 f'{path} for every sample, got none for {info.get("token")}; '
                                 f'make it with {_CREATE}')
        for item in info.get('instances') or ():
            self._complete(item, info['token'])
        if not self.test_mode and not info.get('cam_instances'):
            self._warn('cam_instances', 'the attribute loss of the perspective head will be zero')
        return super().parse_data_info(info)

    def _complete(self, item: dict, token: str) -> None:
        """Gives an instance what data without LiDAR or tracks has not, with a warning."""
        for key in ('bbox_3d', 'bbox_label_3d'):
            if key not in item:
                raise MissingKey(f'NuScenesTemporalDataset: ann_file {self.ann_file} must give '
                                 f'instances.{key} for every object, got {sorted(item)} in sample '
                                 f'{token}')
        points = [item[key] for key in _POINT_COUNTS if key in item]
        if not points:
            self._warn('num_lidar_pts', 'every object counts as visible')
        if 'bbox_3d_isvalid' not in item:
            item['bbox_3d_isvalid'] = not points or sum(points) > 0
        if not self.use_valid_flag and 'num_lidar_pts' not in item:
            raise MissingKey(f'NuScenesTemporalDataset: ann_file {self.ann_file} must give '
                             f'instances.num_lidar_pts for every object, got {sorted(item)} in '
                             f'sample {token}; or set use_valid_flag=True')
        if 'velocity' not in item:
            item['velocity'] = [float('nan')] * 2  # unknown, which the speed loss leaves out
            self._warn('velocity', 'the BEV head learns that everything stands still; set the '
                       'last two of model.bev_head.train_cfg.code_weights to 0')

    def _warn(self, key: str, effect: str) -> None:
        """Says once that the info file lacks a key, and what follows."""
        if key not in self._missing:
            self._missing.add(key)
            warnings.warn(f'NuScenesTemporalDataset: {self.ann_file} gives no {key}: {effect}',
                          stacklevel=2)

    def filter_data(self) -> list[dict]:
        """Filters as the parent does, and notes where each sample stands in its scene."""
        data_list = super().filter_data()
        self._index = {info['token']: index for index, info in enumerate(data_list)}
        if len(self.frames) > 1:
            self._links = self._read_links(data_list)
        return data_list

    def full_init(self) -> None:
        """Loads the infos; a subset (`indices`) has neighbours in the subset only."""
        if self._fully_initialized:
            return
        super().full_init()
        if self._indices is not None:
            self._index = {self.get_sample_info(index)['token']: index
                           for index in range(len(self))}

    def _read_links(self, data_list: Sequence[dict]) -> dict[str, Link]:
        if all({'scene_token', 'prev', 'next'} <= set(info) for info in data_list):
            return {info['token']: Link(info['scene_token'], info['prev'], info['next'])
                    for info in data_list}
        path = Path(self.scene_table or
                    Path(self.data_root, self.metainfo['version'], 'sample.json'))
        if not path.is_file():
            raise MissingFile(
                f'NuScenesTemporalDataset: frames {self.frames} need the links between samples, '
                f'which the info file does not hold, and there is no {path}; unpack the nuScenes '
                'tables there, or set scene_table')
        rows = json.loads(path.read_text())
        links = {row['token']: Link(row['scene_token'], row['prev'], row['next']) for row in rows}
        unknown = [info['token'] for info in data_list if info['token'] not in links]
        if unknown:
            raise InvalidValue(
                f'NuScenesTemporalDataset: scene_table {path} must list every sample, got none '
                f'for {len(unknown)}, the first {unknown[0]}; is it the table of this split?')
        return links

    def scenes(self) -> dict[str, list[int]]:
        """Indices of the samples of each scene, by its token, in the order of time.

        Raises:
            FileNotFoundError: neither the info file nor a table tells the scenes.
        """
        self.full_init()
        infos = [self.get_sample_info(index) for index in range(len(self))]
        links = self._links or self._read_links(infos)
        found: dict[str, list[int]] = {}
        for index in sorted(range(len(infos)), key=lambda index: infos[index]['timestamp']):
            found.setdefault(links[infos[index]['token']].scene, []).append(index)
        return found

    def get_sample_info(self, index: int) -> dict:
        """The info of one sample, without its neighbours."""
        return super().get_data_info(index)

    def _neighbour(self, token: str, offset: int) -> Optional[dict]:
        """The info `offset` key frames away, None where the scene or the file ends."""
        scene = self._links[token].scene
        for _ in range(abs(offset)):
            token = self._links[token].prev if offset < 0 else self._links[token].next
            if token not in self._links or self._links[token].scene != scene:
                return None
        return self.get_sample_info(self._index[token]) if token in self._index else None

    def get_data_info(self, idx: int) -> dict:
        """The info of one sample, with `frames`, `frame_infos`, `classes`, `label_mapping`."""
        info = super().get_data_info(idx)
        info['classes'] = tuple(self.metainfo['classes'])
        info['frames'] = self.frames
        info['label_mapping'] = self.label_mapping
        info['frame_infos'] = [
            {key: info[key] for key in ('images', 'ego2global', 'token')} if offset == 0
            else self._neighbour(info['token'], offset) for offset in self.frames]
        return info
