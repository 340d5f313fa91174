# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Which pixel of which level stands for which object of an image.

Source:   "FCOS", Tian et al., ICCV 2019, arXiv:1904.01355, section 3, with centre sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from ..geometry import constant

# fields of `gt_mono`, see MonoTargets
FIELDS = ('cam_idx', 'labels', 'bboxes', 'centers_2d', 'depths', 'sizes_wlh', 'rots', 'attrs',
          'speeds')


@dataclass(frozen=True)
class Locations:
    """All pixels of all levels that predict.

    Attributes:
        points: shape (P, 2): x, y in pixels of the padded image, at the top-left corner of a cell.
        strides: shape (P,): of the level, in pixels.
        ranges: shape (P, 2): the largest distance to a side of the box that the level predicts.
    """

    points: Tensor
    strides: Tensor
    ranges: Tensor

    @classmethod
    def of(cls, sizes: Sequence[tuple[int, int]], strides: Sequence[int],
           ranges: Sequence[Sequence[float]], device: torch.device) -> Locations:
        """From the (height, width) of the levels."""
        points, all_strides, all_ranges = [], [], []
        for (height, width), stride, limits in zip(sizes, strides, ranges):
            y, x = torch.meshgrid(torch.arange(height, device=device),
                                  torch.arange(width, device=device), indexing='ij')
            points.append(torch.stack([x, y], -1).flatten(0, 1).float() * stride)
            all_strides.append(points[-1].new_full((len(points[-1]),), stride))
            all_ranges.append(constant(points[-1], limits).expand(len(points[-1]), 2))
        return cls(torch.cat(points), torch.cat(all_strides), torch.cat(all_ranges))


def distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Left, top, right, bottom distances (..., 4) of points (..., 2) to the sides of boxes."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def _fitting_areas(locations: Locations, boxes: Tensor, center_radius: float) -> Tensor:
    """Areas (P, m) of the boxes that a location may predict, infinite for all others."""
    points = locations.points[:, None]
    sides = distances(points, boxes[None])  # (P, m, 4)
    offset = (points - (boxes[:, :2] + boxes[:, 2:]) / 2).abs()
    is_central = (offset < center_radius * locations.strides[:, None, None]).all(-1)
    largest = sides.max(-1).values
    fits = (largest >= locations.ranges[:, :1]) & (largest <= locations.ranges[:, 1:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1).expand(len(sides), -1)
    return area.where((sides > 0).all(-1) & is_central & fits, torch.inf)


def assign_locations(locations: Locations, boxes: Tensor, center_radius: float,
                     images: Optional[Sequence[Tensor]] = None) -> Tensor:
    """The object that each location predicts, the smallest where several could be.

    Args:
        locations: P of them.
        boxes: shape (m, 4): x1, y1, x2, y2 in pixels.
        center_radius: half side, in strides, of the square about the box centre that counts.
        images: for each of V images, which boxes are in it, shape (m,); None for one with all.

    Returns:
        Shape (V, P): rows of `boxes`, -1 for background.
    """
    images = [boxes.new_ones(len(boxes), dtype=torch.bool)] if images is None else images
    if not len(boxes):
        return locations.strides.new_full((len(images), len(locations.strides)), -1,
                                          dtype=torch.long)
    area = _fitting_areas(locations, boxes, center_radius)
    rows = []
    for is_inside in images:  # masks: with lists of boxes the host would wait for their lengths
        smallest, index = area.where(is_inside, torch.inf).min(-1)
        rows.append(index.where(smallest.isfinite(), -1))
    return torch.stack(rows)


def assign_images(locations: Locations, objects: Sequence[InstanceData], num_cams: int,
                  center_radius: float) -> tuple[Tensor, InstanceData]:
    """Assigns the locations of all images of a batch.

    Args:
        locations: P of them, the same in every image.
        objects: `gt_mono` of each of the B samples.
        num_cams: images V per sample.
        center_radius: of :func:`assign_locations`.

    Returns:
        Rows (B * V, P) of the objects of the whole batch, -1 for background; these objects.
    """
    device = locations.points.device
    merged = InstanceData(**{
        field: torch.cat([sample[field].to(device) for sample in objects]) for field in FIELDS})
    rows, start = [], 0
    for sample in objects:
        end = start + len(sample.cam_idx)
        images = [merged.cam_idx[start:end] == cam for cam in range(num_cams)]
        index = assign_locations(locations, merged.bboxes[start:end], center_radius, images)
        rows.append((index + start).where(index >= 0, -1))
        start = end
    return torch.cat(rows), merged
