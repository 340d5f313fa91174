# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The metric of nuScenes, which looks at its files before the run and not after it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Optional

from mmdet3d.evaluation.metrics import NuScenesMetric
from mmdet3d.registry import METRICS
from mmengine.evaluator import BaseMetric

from ...errors import InvalidValue, MissingFile
from ...safe_files import load_infos

SPLITS = {'v1.0-mini': 'mini_val', 'v1.0-trainval': 'val'}  # what the devkit evaluates


@METRICS.register_module()
class NuScenesSplitMetric(NuScenesMetric):
    """`NuScenesMetric` that refuses an info file which does not cover the evaluated split.

    The devkit asserts that there are predictions for exactly the samples of its split, after the
    last prediction. Here the tables are read when the loop is built, before the first sample.
    Nothing is checked with `format_only`. Arguments are those of the parent class.

    Raises:
        ValueError: the version has no evaluated split, or the info file lacks samples of the
            split or has others.
        FileNotFoundError: a table or the folder `maps` is missing in `data_root`.
    """

    @property
    def dataset_meta(self) -> Optional[dict]:
        """Meta information of the dataset; setting it checks the files."""
        return self._dataset_meta

    @dataset_meta.setter
    def dataset_meta(self, dataset_meta: dict) -> None:
        base: Any = BaseMetric.dataset_meta
        base.fset(self, dataset_meta)
        if not self.format_only:
            self._check_split(dataset_meta['version'])

    def _rows(self, version: str, name: str) -> list[dict]:
        path = Path(self.data_root, version, f'{name}.json')
        if not path.is_file():
            raise MissingFile(
          f'NuScenesSplitMetric: data_root must hold {version}/{name}.json, got no {path}; '
          'unpack the tables of nuScenes there, or set metainfo.version of the dataset')
        return json.loads(path.read_text())

    def _check_split(self, version: str) -> None:
        if version not in SPLITS:
            raise InvalidValue(
                  f'NuScenesSplitMetric: metainfo.version must be one of {list(SPLITS)} to be '
                  f'scored, got {version!r}; set format_only=True and jsonfile_prefix')
        if not Path(self.data_root, 'maps').is_dir():
            raise MissingFile('NuScenesSplitMetric: data_root must hold the folder maps, '
                              f'got none in {self.data_root}')
        from nuscenes.utils.splits import create_splits_scenes
        names = set(create_splits_scenes()[SPLITS[version]])
        scenes = {row['token'] for row in self._rows(version, 'scene') if row['name'] in names}
        wanted = {row['token'] for row in self._rows(version, 'sample')
                  if row['scene_token'] in scenes}
        infos = load_infos(self.ann_file, self.backend_args)['data_list']
        given = {info['token'] for info in infos}
        if given != wanted:
            raise InvalidValue(
                  f'NuScenesSplitMetric: ann_file {self.ann_file} must hold exactly the '
                  f'{len(wanted)} samples of {SPLITS[version]} ({version}), got {len(given)}, of '
                  f'which {len(given - wanted)} are not in it, and {len(wanted - given)} are '
                  'missing; make it again with tools/dataset_converters/nuscenes.py, or set '
                  'format_only=True and jsonfile_prefix to get boxes without a score')
