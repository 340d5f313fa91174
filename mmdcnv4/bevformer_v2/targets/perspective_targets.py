# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Which pixel of which level stands for which object of an image.

Source:   "FCOS", Tian et al., ICCV 2019, arXiv:1904.01355, section 3, with centre sampling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from mmengine.structures import InstanceData
from torch import Tensor

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
            all_ranges.append(points[-1].new_tensor(limits).expand(len(points[-1]), 2))
        return cls(torch.cat(points), torch.cat(all_strides), torch.cat(all_ranges))


def distances(points: Tensor, boxes: Tensor) -> Tensor:
    """Left, top, right, bottom distances (..., 4) of points (..., 2) to the sides of boxes."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], -1)


def assign_locations(locations: Locations, boxes: Tensor, center_radius: float) -> Tensor:
    """The object that each location predicts, the smallest where several could be.

    Args:
        locations: P of them.
        boxes: shape (m, 4): x1, y1, x2, y2 in pixels.
        center_radius: half side, in strides, of the square about the box centre that counts.

    Returns:
        Shape (P,): rows of `boxes`, -1 for background.
    """
    if not len(boxes):
        return torch.full_like(locations.strides, -1, dtype=torch.long)
    points = locations.points[:, None]
    sides = distances(points, boxes[None])  # (P, m, 4)
    offset = (points - (boxes[:, :2] + boxes[:, 2:]) / 2).abs()
    is_central = (offset < center_radius * locations.strides[:, None, None]).all(-1)
    largest = sides.max(-1).values
    fits = (largest >= locations.ranges[:, :1]) & (largest <= locations.ranges[:, 1:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1).expand(len(sides), -1)
    area = area.where((sides > 0).all(-1) & is_central & fits, torch.inf)
    smallest, index = area.min(-1)
    return index.where(smallest.isfinite(), -1)


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
        for cam in range(num_cams):
            own = start + torch.nonzero(sample.cam_idx.to(device) == cam)[:, 0]
            index = assign_locations(locations, merged.bboxes[own], center_radius)
            rows.append(torch.cat([own, own.new_tensor([-1])])[index])  # -1 takes the last entry
        start += len(sample.cam_idx)
    return torch.stack(rows), merged
