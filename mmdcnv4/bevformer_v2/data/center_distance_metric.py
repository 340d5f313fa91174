# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The average precision of nuScenes for data of one's own: any classes, and no tables.

Source:   "nuScenes: A multimodal dataset for autonomous driving", Caesar et al., CVPR 2020,
          arXiv:1903.11027, section 3.1.
Differs:  the errors are plain means over the matches at two metres; nothing is cut by class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import numpy as np
import torch
from mmdet3d.registry import METRICS
from mmengine.evaluator import BaseMetric
from mmengine.logging import MMLogger

from ...errors import InvalidValue

_RECALLS = np.linspace(0, 1, 101)
_FLOOR = 0.1  # recalls and precisions below do not count
_MATCH = 2.0  # metres; where the errors are taken
_ERRORS = ('translation', 'scale', 'orientation', 'velocity')
_UNITS = dict(translation='m', scale='1 - IoU', orientation='rad', velocity='m/s')


def match(found: np.ndarray, scores: np.ndarray, found_in: np.ndarray, truth: np.ndarray,
          truth_in: np.ndarray, distance: float) -> np.ndarray:
    """Which object each prediction is, best scores first; each object is found once.

    Args:
        found: centres (n, 2) of the predictions of one class, metres.
        scores: shape (n,).
        found_in: shape (n,): the sample of each.
        truth, truth_in: centres (m, 2) of the objects and their samples (m,).
        distance: in metres on the ground; what is as far is no match.

    Returns:
        Shape (n,): the index of the nearest object that is still free, -1 for none.
    """
    out = np.full(len(found), -1)
    is_free = np.ones(len(truth), bool)
    for index in np.argsort(-scores, kind='stable'):
        apart = np.linalg.norm(truth - found[index], axis=1)
        apart[~is_free | (truth_in != found_in[index])] = np.inf
        if len(apart) and apart.min() < distance:
            out[index] = int(apart.argmin())
            is_free[out[index]] = False
    return out


def average_precision(is_true: np.ndarray, scores: np.ndarray, num_objects: int) -> float:
    """Normalised area under the part of the curve with recall and precision above 0.1.

    Args:
        is_true: shape (n,): whether a prediction is an object.
        scores: shape (n,).
        num_objects: objects of the class; NaN is returned without any.
    """
    if num_objects == 0:
        return float('nan')
    if not is_true.any():
        return 0.0
    is_true = is_true[np.argsort(-scores, kind='stable')]
    hits = np.cumsum(is_true)
    recalls, precisions = hits / num_objects, hits / np.arange(1, len(hits) + 1)
    curve = np.interp(_RECALLS, recalls, precisions, right=0)
    above = curve[round(100 * _FLOOR) + 1:] - _FLOOR
    return float(above.clip(0).mean() / (1 - _FLOOR))


def box_errors(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Mean errors of matched boxes (n, 9): centre, size, yaw and velocity; NaN without a box.

    Metres on the ground; one minus the IoU of boxes with the same centre and yaw; radians, at most
    pi; metres per second, over objects whose velocity is known.
    """
    if not len(found):
        return dict.fromkeys(_ERRORS, float('nan'))
    smaller = np.minimum(found[:, 3:6], truth[:, 3:6]).prod(1)
    iou = smaller / (found[:, 3:6].prod(1) + truth[:, 3:6].prod(1) - smaller)
    turn = np.abs((found[:, 6] - truth[:, 6] + np.pi) % (2 * np.pi) - np.pi)
    speed = np.linalg.norm(found[:, 7:9] - truth[:, 7:9], axis=1)
    speed = speed[np.isfinite(speed)]
    return dict(translation=float(np.linalg.norm(found[:, :2] - truth[:, :2], axis=1).mean()),
                scale=float(1 - iou.mean()), orientation=float(turn.mean()),
                velocity=float(speed.mean()) if len(speed) else float('nan'))


@METRICS.register_module()
class CenterDistanceMetric(BaseMetric):
    """AP by the distance of centres on the ground, and the errors of what was found.

    Takes the truth from the samples: the info file must have `instances`, and the dataset needs
    `test_mode=True` with `load_eval_anns=True` (the default). Classes without an object are left
    out of the means. A velocity that the info file does not give counts as zero, as in training.

    Args:
        distances: in metres; AP is the mean over them.
        max_range: objects and predictions farther from the LiDAR are left out, metres; None keeps
            all.
        collect_device, prefix: of mmengine.

    Raises:
        ValueError: no positive distances or range, samples without truth, or no object at all.
    """

    default_prefix = 'bev'

    def __init__(self, distances: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
                 max_range: Optional[float] = None, collect_device: str = 'cpu',
                 prefix: Optional[str] = None) -> None:
        super().__init__(collect_device=collect_device, prefix=prefix)
        if not distances or min(distances) <= 0:
            raise InvalidValue('CenterDistanceMetric: distances must be numbers > 0, got '
                               f'{distances}')
        if max_range is not None and max_range <= 0:
            raise InvalidValue(f'CenterDistanceMetric: max_range must be > 0, got {max_range}')
        self.distances, self.max_range = tuple(distances), max_range

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keeps boxes, scores and labels of the samples, and the true boxes and labels."""
        for sample in data_samples:
            truth, found = sample.get('eval_ann_info'), sample['pred_instances_3d']
            if not truth:
                raise InvalidValue(
                    'CenterDistanceMetric: every sample must have true boxes, got none for sample '
                    f'{sample.get("token")}; set test_mode=True and load_eval_anns=True in the '
                    'dataset, and give instances in the info file')
            self.results.append((
                *self._within(found['bboxes_3d'], found['labels_3d'], found['scores_3d']),
                *self._within(truth['gt_bboxes_3d'], truth['gt_labels_3d'],
                              np.ones(len(truth['gt_labels_3d'])))[:2]))

    def _within(self, boxes: Any, labels: Any, scores: Any) -> tuple[np.ndarray, ...]:
        """Boxes (n, 9) with their centres at half their height, labels and scores, in range."""
        rows = torch.cat([boxes.gravity_center, boxes.tensor[:, 3:]], 1).double()
        keep = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
        if self.max_range is not None:
            keep = rows[:, :2].norm(dim=1) <= self.max_range
        return tuple(torch.as_tensor(x, device=rows.device)[keep].cpu().numpy()
                     for x in (rows, labels, scores))

    def _score(self, found: np.ndarray, scores: np.ndarray, found_in: np.ndarray,
               truth: np.ndarray, truth_in: np.ndarray) -> tuple[list[float], dict[str, float]]:
        """AP at each distance, and the errors, of the boxes of one class."""
        def pairs(distance: float) -> np.ndarray:
            return match(found[:, :2], scores, found_in, truth[:, :2], truth_in, distance)

        index = pairs(_MATCH)
        return ([average_precision(pairs(distance) >= 0, scores, len(truth))
                 for distance in self.distances],
                box_errors(found[index >= 0], truth[index[index >= 0]]))

    def compute_metrics(self, results: list) -> dict[str, float]:
        """AP of each class, mAP, AP at each distance, and the mean errors at two metres."""
        boxes, labels, scores, truth, true_labels = (
            np.concatenate([part[place] for part in results]) for place in range(5))
        found_in, truth_in = (np.repeat(np.arange(len(results)), [len(part[place])
                                                                  for part in results])
                              for place in (1, 4))
        table: dict[str, tuple[list[float], dict[str, float], int]] = {}
        for label, name in enumerate((self.dataset_meta or {})['classes']):
            mine, own = labels == label, true_labels == label
            if own.any():
                precisions, errors = self._score(boxes[mine], scores[mine], found_in[mine],
                                                 truth[own], truth_in[own])
                table[name] = precisions, errors, int(own.sum())
        if not table:
            raise InvalidValue('CenterDistanceMetric: the samples must have objects of some class,'
                               ' got none in range; is max_range too small?')
        self._log(table)
        precision = np.array([row[0] for row in table.values()])
        out = {f'{name}_AP': float(value) for name, value in zip(table, precision.mean(1))}
        out.update({f'AP_{distance:g}m': float(value)
                    for distance, value in zip(self.distances, precision.mean(0))})
        out['mAP'] = float(precision.mean())
        for key in _ERRORS:
            known = [row[1][key] for row in table.values() if np.isfinite(row[1][key])]
            out[f'{key}_error'] = float(np.mean(known)) if known else float('nan')
        return out

    def _log(self, table: dict) -> None:
        """One line per class."""
        lines = ['class: objects, ' + ', '.join(f'AP {distance:g} m' for distance in self.distances)
                 + ', ' + ', '.join(f'{key} ({unit})' for key, unit in _UNITS.items())]
        lines += [f'{name}: {count}, ' + ', '.join(f'{value:.3f}' for value in
                                                   (*precisions, *errors.values()))
                  for name, (precisions, errors, count) in table.items()]
        MMLogger.get_current_instance().info('\n'.join(lines))
