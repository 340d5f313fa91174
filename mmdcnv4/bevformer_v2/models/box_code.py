# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The ten numbers in which the BEV head writes a box, and their distance for the assignment.

A code is (x, y, log length, log width, z, log height, sin yaw, cos yaw, vx, vy); x, y, z is the
gravity centre in metres, LiDAR frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import torch
from mmdet.models.task_modules.assigners.match_cost import BaseMatchCost
from mmdet3d.registry import TASK_UTILS
from mmengine.structures import InstanceData
from torch import Tensor

from ...errors import InvalidValue
from ..geometry import constant

CODE_SIZE = 10
_MIN_SIZE = 1e-3  # metres; the log of a flat box would be infinite


def encode_boxes(boxes: Tensor) -> Tensor:
    """Codes (n, 10) of boxes (n, 9): x, y, z (gravity), length, width, height, yaw, vx, vy."""
    x, y, z, length, width, height, yaw, vx, vy = boxes.unbind(-1)
    logs = [side.clamp(min=_MIN_SIZE).log() for side in (length, width, height)]
    return torch.stack([x, y, logs[0], logs[1], z, logs[2], yaw.sin(), yaw.cos(), vx, vy], -1)


def raw_center(codes: Tensor) -> Tensor:
    """The entries x, y, z (..., 3) of codes (..., 10)."""
    return torch.cat([codes[..., :2], codes[..., 4:5]], -1)


def decode_boxes(codes: Tensor) -> Tensor:
    """Boxes (n, 9) of codes (n, 10); the inverse of :func:`encode_boxes`, yaw in (-pi, pi]."""
    x, y, length, width, z, height, sin, cos, vx, vy = codes.unbind(-1)
    return torch.stack([x, y, z, length.exp(), width.exp(), height.exp(), torch.atan2(sin, cos),
                        vx, vy], -1)


def select_boxes(logits: Tensor, codes: Tensor, max_per_sample: int,
                 post_center_range: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """The best boxes of one sample, without suppression: a query may appear with several classes.

    Args:
        logits: shape (Q, K).
        codes: shape (Q, 10).
        max_per_sample: at most so many.
        post_center_range: six numbers in metres; centres outside are dropped.

    Returns:
        Boxes (n, 9), scores (n,) in descending order, labels (n,).
    """
    num_classes = logits.shape[-1]
    scores, order = logits.sigmoid().flatten().topk(min(max_per_sample, logits.numel()))
    boxes = decode_boxes(codes[order // num_classes])
    limits = constant(boxes, post_center_range)
    inside = ((boxes[:, :3] >= limits[:3]) & (boxes[:, :3] <= limits[3:])).all(-1)
    kept = torch.nonzero(inside)[:, 0]  # here the host waits, and not for each of the three
    return boxes[kept], scores[kept], (order % num_classes)[kept]


@TASK_UTILS.register_module()
class BBox3DCodeSmoothL1Cost(BaseMatchCost):
    """Smooth-L1 distance (beta 1) of codes, summed over their first entries.

    Args:
        weight: of this cost among those of the assigner.
        dims: entries that count; 8 leaves the velocity out.
    """

    def __init__(self, weight: float = 1.0, dims: int = 8) -> None:
        super().__init__(weight)
        if not 1 <= dims <= CODE_SIZE:
            raise InvalidValue(f'BBox3DCodeSmoothL1Cost: dims must be 1 ... {CODE_SIZE}, '
                               f'got {dims}')
        self.dims = dims

    def __call__(self, pred_instances: InstanceData, gt_instances: InstanceData,
                 img_meta: Optional[dict] = None, **unused: Any) -> Tensor:
        """Costs, shape (predictions, objects), from `bboxes` of both: codes (n, 10)."""
        predicted = pred_instances.bboxes[:, None, :self.dims]
        target = gt_instances.bboxes[None, :, :self.dims]
        difference = (predicted - target).abs()
        cost = torch.where(difference < 1, 0.5 * difference**2, difference - 0.5)
        return self.weight * cost.sum(-1)
