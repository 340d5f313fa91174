# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Perspective targets: what each camera sees of the LiDAR-frame annotations.

Visibility follows the rules of the nuScenes devkit (Caesar et al., CVPR 2020, arXiv:1903.11027):
all corners before the camera, one of them inside the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet3d.registry import TRANSFORMS

from ..geometry import box_corners, lidar_boxes_to_camera

# `attr_label` of the info file to one of three states that mean the same for all classes:
# cycle with rider 0, without rider 1; pedestrian moving 0, standing 1, sitting or lying 2;
# vehicle moving 0, parked 1, stopped 2
ATTRIBUTES = (0, 1, 0, 1, 2, 0, 1, 2)
NO_ATTRIBUTE = 3
_IN_FRONT, _VISIBLE = 0.1, 1.0  # metres
_SAME_CENTER = 0.05  # metres


@TRANSFORMS.register_module()
class MonoTargets(BaseTransform):
    """Adds `gt_mono`: one record per camera and visible object of the current frame.

    It reads the annotations of the info file (`instances`), never augmented boxes, and comes
    after :class:`MultiViewCropResize`. Fields, m rows: `cam_idx`, `labels`, `bboxes` (x1, y1, x2,
    y2 in network pixels), `centers_2d` (may lie outside the image), `depths`, `sizes_wlh`, `rots`
    (object to camera), `attrs` (0 ... 2, 3 for none), `speeds` (m/s, may be NaN).

    Args:
        min_points: LiDAR and radar points on an object, where the info file counts them.
        min_visibility: part of the projected box that must be inside the image.
    """

    def __init__(self, min_points: int = 3, min_visibility: float = 0.2) -> None:
        self.min_points, self.min_visibility = min_points, min_visibility

    def _is_seen(self, item: dict) -> bool:
        """Whether enough points lie on an object; data without any counts has it seen."""
        counts = [item[key] for key in ('num_lidar_pts', 'num_radar_pts') if key in item]
        return not counts or sum(counts) >= self.min_points

    def _objects(self, results: dict) -> dict[str, torch.Tensor]:
        """Annotations of classes of the model with enough points, float64."""
        mapping = results['label_mapping']
        chosen = [item for item in results['instances']
                  if mapping[item['bbox_label_3d']] >= 0
                  and self._is_seen(item)]
        boxes = [item['bbox_3d'][:7] for item in chosen]
        velocity = [item.get('velocity', (np.nan, np.nan)) for item in chosen]
        raw = [item['bbox_label_3d'] for item in chosen]
        return dict(
            boxes=torch.tensor(boxes, dtype=torch.float64).reshape(-1, 7),
            speeds=torch.tensor(velocity, dtype=torch.float64).reshape(-1, 2).norm(dim=-1),
            raw_labels=torch.tensor(raw, dtype=torch.long),
            labels=torch.tensor([mapping[label] for label in raw], dtype=torch.long))

    def transform(self, results: dict) -> dict:
        """Builds the records of all cameras."""
        objects = self._objects(results)
        current = results['frames'].index(0)
        scale = torch.from_numpy(results['image_transform'])
        records: list[dict[str, torch.Tensor]] = []
        for cam, name in enumerate(results['cameras']):
            cam2img = torch.from_numpy(results['cam2img'][current, cam])[:3, :3]
            lidar2cam = torch.from_numpy(results['lidar2cam'][current, cam])
            record = self._camera(objects, cam2img, lidar2cam, scale, results['ori_shape'],
                                  results['img_shape'])
            known = results.get('cam_instances', {}).get(name)
            record['attrs'] = _match_attributes(record.pop('centers'), record.pop('raw_labels'),
                                                known)
            record['cam_idx'] = torch.full_like(record['labels'], cam)
            records.append(record)
        merged = {key: torch.cat([record[key] for record in records]) for key in records[0]}
        results['gt_mono'] = {
            key: (value.float() if value.is_floating_point() else value).numpy()
            for key, value in merged.items()}
        return results

    def _camera(self, objects: dict[str, torch.Tensor], cam2img: torch.Tensor,
                lidar2cam: torch.Tensor, scale: torch.Tensor, raw_shape: Sequence[int],
                shape: Sequence[int]) -> dict[str, torch.Tensor]:
        """Records of one camera; `scale` maps raw to network pixels, where `cam2img` ends."""
        centers, sizes, rots = lidar_boxes_to_camera(objects['boxes'], lidar2cam)
        corners = box_corners(centers, sizes, rots)
        pixels = (corners @ (torch.linalg.inv(scale) @ cam2img).T)  # raw pixels, homogeneous
        depth = corners[..., 2]
        pixels = pixels[..., :2] / pixels[..., 2:].clamp(min=_IN_FRONT)
        limit = torch.tensor([raw_shape[1], raw_shape[0]], dtype=pixels.dtype)
        is_inside = ((pixels > 0) & (pixels < limit)).all(-1) & (depth > _VISIBLE)
        keep = (depth > _IN_FRONT).all(-1) & is_inside.any(-1)
        full = torch.cat([pixels.amin(1), pixels.amax(1)], -1)
        clipped = torch.cat([full[:, :2].clamp(min=0), full[:, 2:].minimum(limit)], -1)
        keep &= _area(clipped) >= self.min_visibility * _area(full)
        network = clipped * scale[[0, 1, 0, 1], [0, 1, 0, 1]] + scale[[0, 1, 0, 1], 2]
        size = torch.tensor([shape[1], shape[0]], dtype=pixels.dtype)
        network = torch.cat([network[:, :2].clamp(min=0), network[:, 2:].minimum(size)], -1)
        keep &= (network[:, 2:] > network[:, :2]).all(-1) & (centers[:, 2] > 0)
        projected = centers @ cam2img.T
        fields = dict(
            labels=objects['labels'], raw_labels=objects['raw_labels'], bboxes=network,
            centers=centers, centers_2d=projected[:, :2] / projected[:, 2:],
            depths=centers[:, 2], sizes_wlh=sizes, rots=rots, speeds=objects['speeds'])
        return {key: value[keep] for key, value in fields.items()}


def _area(boxes: torch.Tensor) -> torch.Tensor:
    return (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(-1)


def _match_attributes(centers: torch.Tensor, raw_labels: torch.Tensor,
                      known: Optional[Sequence[dict]]) -> torch.Tensor:
    """Attributes (m,) of the camera annotations with the same label and the same centre."""
    attributes = torch.full_like(raw_labels, NO_ATTRIBUTE)
    if not known or not len(centers):
        return attributes
    known_centers = torch.tensor([item['bbox_3d'][:3] for item in known], dtype=centers.dtype)
    known_labels = torch.tensor([item['bbox_label_3d'] for item in known])
    apart = torch.cdist(centers, known_centers)
    apart = apart.where(raw_labels[:, None] == known_labels[None], torch.inf)
    distance, index = apart.min(1)
    for row in torch.nonzero(distance < _SAME_CENTER)[:, 0].tolist():
        code = known[int(index[row])]['attr_label']
        if 0 <= code < len(ATTRIBUTES):
            attributes[row] = ATTRIBUTES[code]
    return attributes
