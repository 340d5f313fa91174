# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Reads saved predictions: of `tools/test.py --out`, or in the format of the nuScenes server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmdet3d.structures import LiDARInstance3DBoxes
from torch import Tensor

from ..errors import InvalidValue, MissingFile
from ..safe_files import load_infos
from .geometry import quaternion_to_matrix

_BOX_KEYS = ('translation', 'size', 'rotation', 'velocity', 'detection_name', 'detection_score')


class Found(NamedTuple):
    """Predictions of one sample.

    Attributes:
        boxes: `LiDARInstance3DBoxes` with 9 columns, metres, radians and m/s.
        scores: shape (n,).
        labels: shape (n,).
    """

    boxes: Any
    scores: Tensor
    labels: Tensor


def read_results(path: str) -> Mapping[str, Any]:
    """Predictions by sample token, as they stand in the file; see :func:`found_in`.

    Args:
        path: a `.pkl` of `tools/test.py --out`, or a `.json` in the format of the nuScenes server.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another extension, or a file with other content.
    """
    if not Path(path).is_file():
        raise MissingFile(f'the results {path} do not exist or are no file')
    suffix = Path(path).suffix
    if suffix not in ('.pkl', '.pickle', '.json'):
        raise InvalidValue(f'results must be a .pkl of tools/test.py --out or a .json in the '
                           f'format of the nuScenes server, got {path}')
    try:
        content = load_infos(str(path))
        if suffix == '.json':
            return {str(token): list(boxes) for token, boxes in content['results'].items()}
        return {entry['token']: entry['pred_instances_3d'] for entry in content}
    except Exception as error:  # a damaged pickle fails in any way
        expected = 'results by sample token' if suffix == '.json' else (
            'a list of samples with token and pred_instances_3d')
        raise InvalidValue(f'results {path} must hold {expected}: '
                           f'{type(error).__name__}: {error}') from error


def found_in(results: Mapping[str, Any], info: Mapping[str, Any],
             classes: Sequence[str]) -> Found:
    """The predictions of one sample, in its LiDAR frame.

    Args:
        results: of :func:`read_results`.
        info: of the sample, with `token`, `ego2global` and `lidar_points.lidar2ego`.
        classes: names of the labels.

    Raises:
        ValueError: no predictions for the sample, or of a class that is not in `classes`.
    """
    token = info['token']
    if token not in results:
        raise InvalidValue(f'results must hold every sample, got {len(results)} samples without '
                           f'{token}; are they of this split?')
    given = results[token]
    if isinstance(given, Mapping):
        return Found(given['bboxes_3d'].to('cpu'), torch.as_tensor(given['scores_3d']).cpu(),
                     torch.as_tensor(given['labels_3d']).cpu())
    for box in given:
        if not set(_BOX_KEYS) <= set(box) or box['detection_name'] not in classes:
            raise InvalidValue(f'results: a box of sample {token} must have {_BOX_KEYS} and a '
                               f'class out of {tuple(classes)}, got {box}')
    scores = torch.tensor([float(box['detection_score']) for box in given])
    labels = torch.tensor([list(classes).index(box['detection_name']) for box in given])
    return Found(_to_lidar(given, info), scores, labels.long())


def _to_lidar(given: Sequence[dict], info: Mapping[str, Any]) -> LiDARInstance3DBoxes:
    """Boxes in global coordinates as boxes of the LiDAR frame; pitch and roll are dropped."""
    lidar2global = np.asarray(info['ego2global'], np.float64) @ np.asarray(
        info['lidar_points']['lidar2ego'], np.float64)
    global2lidar = np.linalg.inv(lidar2global)
    turn, shift = global2lidar[:3, :3], global2lidar[:3, 3]
    rows = np.zeros((len(given), 9))
    for row, box in zip(rows, given):
        row[:3] = turn @ np.asarray(box['translation'], np.float64) + shift
        width, length, height = box['size']
        row[3:6] = length, width, height
        heading = turn @ quaternion_to_matrix(
            torch.tensor(box['rotation'], dtype=torch.float64)).numpy()[:, 0]
        row[6] = np.arctan2(heading[1], heading[0])
        row[7:9] = (turn @ [*box['velocity'][:2], 0.0])[:2]
    return LiDARInstance3DBoxes(torch.from_numpy(rows).float(), box_dim=9, origin=(0.5, 0.5, 0.5))
