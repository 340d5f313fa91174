# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Decoding and losses of the perspective head, on the pixels that stand for an object.

Source:   "Is Pseudo-Lidar needed for Monocular 3D Object detection?" (DD3D), Park et al., ICCV
          2021, arXiv:2108.06417, sections 3 and 4; disentangled terms from "Disentangling
          Monocular 3D Object Detection", Simonelli et al., ICCV 2019, arXiv:1905.12365, eq. (9).
Differs:  smooth-L1 is continuous at its threshold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry import (
    allocentric_to_egocentric,
    box_corners,
    quaternion_to_matrix,
    unproject,
)

REFERENCE_FOCAL = 500.0  # the learned depth is that of a camera with this focal length
_BETA = 0.05  # metres


@dataclass(frozen=True)
class CameraBoxes:
    """Boxes in camera coordinates, by the quantities that the head predicts.

    Attributes:
        centers_2d: shape (n, 2), projected centre in pixels.
        depths: shape (n,), metres along the optical axis.
        sizes: shape (n, 3): width, length, height in metres.
        rotations: shape (n, 3, 3), object to camera.
        cam2img: shape (n, 3, 3).
    """

    centers_2d: Tensor
    depths: Tensor
    sizes: Tensor
    rotations: Tensor
    cam2img: Tensor

    @property
    def centers(self) -> Tensor:
        """Centres (n, 3), camera frame."""
        return unproject(self.centers_2d, self.depths, self.cam2img)

    @property
    def corners(self) -> Tensor:
        """Corners (n, 8, 3), camera frame."""
        return box_corners(self.centers, self.sizes, self.rotations)


def pixel_size(cam2img: Tensor) -> Tensor:
    """Length (n,) of (1 / fx, 1 / fy)."""
    return (1 / cam2img.diagonal(dim1=-2, dim2=-1)[:, :2]).norm(dim=-1)


def decode(raw: dict[str, Tensor], points: Tensor, canonical: Tensor, cam2img: Tensor,
           depth_range: tuple[float, float]) -> CameraBoxes:
    """Boxes from the raw outputs of the head for the class of each pixel.

    Args:
        raw: `quat` (n, 4), `proj_ctr` (n, 2), `depth` (n, 1), `size` (n, 3).
        points: shape (n, 2), x, y of the pixels.
        canonical: shape (n, 3): mean width, length, height of the class, in metres.
        cam2img: shape (n, 3, 3).
        depth_range: smallest and largest depth in metres.
    """
    centers_2d = points + raw['proj_ctr']
    depths = raw['depth'][:, 0] / (REFERENCE_FOCAL * pixel_size(cam2img))
    ones = torch.ones_like(depths)
    rotations = allocentric_to_egocentric(quaternion_to_matrix(raw['quat']),
                                          unproject(centers_2d, ones, cam2img))
    return CameraBoxes(centers_2d, depths.clamp(*depth_range), (raw['size'].tanh() + 1) * canonical,
                       rotations, cam2img)


def centerness(sides: Tensor) -> Tensor:
    """How central pixels are in their boxes: (n,) in (0, 1] from side distances (n, 4)."""
    horizontal, vertical = sides[:, ::2], sides[:, 1::2]
    ratio = (horizontal.amin(-1) / horizontal.amax(-1)) * (vertical.amin(-1) / vertical.amax(-1))
    return ratio.sqrt()


def giou_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """1 - GIoU (n,) of boxes about the same pixel, by side distances (n, 4)."""
    area = (predicted[:, :2] + predicted[:, 2:]).prod(-1)
    target_area = (target[:, :2] + target[:, 2:]).prod(-1)
    small, large = torch.minimum(predicted, target), torch.maximum(predicted, target)
    inter = (small[:, :2] + small[:, 2:]).prod(-1)
    hull = (large[:, :2] + large[:, 2:]).prod(-1)
    union = area + target_area - inter
    return 1 - (inter + 1) / (union + 1) + (hull - union) / hull.clamp(min=1e-6)


def _corner_loss(boxes: CameraBoxes, target: Tensor) -> Tensor:
    """(n,): mean over the 24 corner coordinates."""
    loss = F.smooth_l1_loss(boxes.corners, target, beta=_BETA, reduction='none')
    return loss.flatten(1).mean(-1)


def disentangled_losses(predicted: CameraBoxes, target: CameraBoxes) -> dict[str, Tensor]:
    """Corner losses (n,) where all but one quantity are the true ones.

    The rotation is relative to the predicted viewing ray, so that a wrong centre shows there too.
    """
    corners = target.corners
    parts = dict(quat='rotations', proj_ctr='centers_2d', depth='depths', size='sizes')
    return {name: _corner_loss(replace(target, **{field: getattr(predicted, field)}), corners)
            for name, field in parts.items()}


def confidence_target(predicted: CameraBoxes, target: CameraBoxes) -> Tensor:
    """(n,) in (0, 1]: exp of minus the mean corner error in metres."""
    error = (predicted.corners - target.corners).abs().flatten(1).mean(-1)
    return (-error).exp().detach()
