# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Geometry of BEVFormer v2: pure functions without state.

Frames: LiDAR x right, y forward, z up; camera x right, y down, z forward; image u right, v down.
`<from>2<to>` maps a point in `from` to a point in `to`. Lengths are metres, angles radians.

Source:   "BEVFormer v2", Yang et al., CVPR 2023, arXiv:2211.10439, section 3; the box geometry of
          the perspective head is that of "Is Pseudo-Lidar needed for Monocular 3D Object
          detection?", Park et al., ICCV 2021, arXiv:2108.06417.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Optional, Union

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InvalidValue

MIN_DEPTH = 1e-5  # metres; what is nearer does not project
_FAR = 100.0  # image widths; beyond, a point samples zero whatever its offset


def constant(like: Tensor, values: Sequence[float],
             dtype: Optional[torch.dtype] = None) -> Tensor:
    """`like.new_tensor(values)`, filled on the device: a copy would make the host wait for it.

    Args:
        like: gives device and dtype.
        values: one-dimensional.
        dtype: another one than that of `like`.
    """
    return torch.stack([like.new_full((), value, dtype=dtype) for value in values])


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """A tensor on the device; from pinned memory, so that the host need not wait for the copy."""
    tensor = torch.from_numpy(array)
    if device.type == 'cuda':
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def inverse(matrices: Tensor) -> Tensor:
    """`torch.linalg.inv` without its look at whether there is one, for which the host would wait.

    The matrices of the samples are looked at before, see `Geometry`.
    """
    return torch.linalg.inv_ex(matrices).inverse


def check_range(owner: str, pc_range: Sequence[float]) -> tuple[float, ...]:
    """The range as a tuple.

    Raises:
        ValueError: it is not three minima and three larger maxima; names `owner`.
    """
    if len(pc_range) != 6 or any(pc_range[i] >= pc_range[i + 3] for i in range(3)):
        raise InvalidValue(f'{owner}: pc_range must be three minima and three larger maxima, '
                           f'got {tuple(pc_range)}')
    return tuple(pc_range)


def cell_centers(pc_range: Sequence[float], bev_size: Sequence[int],
                 device: Optional[torch.device] = None) -> Tensor:
    """Centres (x, y) in metres of the BEV cells, row-major: row h follows y, column w follows x.

    Args:
        pc_range: (x_min, y_min, z_min, x_max, y_max, z_max) in metres, LiDAR frame.
        bev_size: (Hb, Wb).
        device: of the result.

    Returns:
        Shape (Hb * Wb, 2).
    """
    rows, columns = bev_size
    x, y = (torch.arange(count, device=device) for count in (columns, rows))
    x = pc_range[0] + (x + 0.5) / columns * (pc_range[3] - pc_range[0])
    y = pc_range[1] + (y + 0.5) / rows * (pc_range[4] - pc_range[1])
    y, x = torch.meshgrid(y, x, indexing='ij')
    return torch.stack([x, y], -1).flatten(0, 1)


def pillar_points(pc_range: Sequence[float], bev_size: Sequence[int], num_points: int) -> Tensor:
    """Points above each BEV cell, half a metre off floor and ceiling and equally far apart.

    Returns:
        Shape (Hb * Wb, Z, 3), x, y, z in metres, LiDAR frame.
    """
    height = pc_range[5] - pc_range[2]
    z = pc_range[2] + torch.linspace(0.5, height - 0.5, num_points)
    xy = cell_centers(pc_range, bev_size)
    return torch.cat([xy[:, None].expand(-1, num_points, -1),
                      z[None, :, None].expand(len(xy), -1, -1)], -1)


def project_points(points: Tensor, lidar2img: Tensor, image_size: Sequence[int],
                   own_sizes: Optional[Tensor] = None) -> tuple[Tensor, Tensor]:
    """Projects points into all cameras, in float32 and without a matrix product (no TF32).

    Args:
        points: shape (Q, Z, 3), LiDAR frame.
        lidar2img: shape (B, V, 4, 4).
        image_size: (height, width) in pixels of the padded image.
        own_sizes: shape (B, 2): (height, width) in pixels of the images of each sample, without
            padding; None if nothing is padded.

    Returns:
        `uv`, shape (B, V, Q, Z, 2), in widths and heights of the padded image; `is_visible`,
        shape (B, V, Q, Z): before the camera and inside the image itself.
    """
    matrix = lidar2img.float()[:, :, None, None]  # (B, V, 1, 1, 4, 4)
    points = points.float()[None, None, :, :, None]  # (1, 1, Q, Z, 1, 3)
    camera = (matrix[..., :3, :3] * points).sum(-1) + matrix[..., :3, 3]  # (B, V, Q, Z, 3)
    depth = camera[..., 2]
    size = constant(camera, [image_size[1], image_size[0]])
    uv = camera[..., :2] / depth.clamp(min=MIN_DEPTH)[..., None] / size
    limit: Union[Tensor, float] = 1.0
    if own_sizes is not None:
        limit = (own_sizes.flip(-1).to(size) / size)[:, None, None, None]  # (B, 1, 1, 1, 2)
    is_visible = (depth > MIN_DEPTH) & ((uv > 0) & (uv < limit)).all(-1)
    return uv.clamp(-_FAR, _FAR), is_visible


def current2frame(lidar2ego: np.ndarray, ego2global: np.ndarray,
                  frame_ego2global: np.ndarray) -> np.ndarray:
    """The matrix from the current LiDAR frame to that of another point in time, in float64.

    Global coordinates reach kilometres: float32 would lose millimetres here.

    Args:
        lidar2ego: shape (4, 4), of the current sample.
        ego2global: shape (4, 4), of the current sample.
        frame_ego2global: shape (4, 4), of the other frame.
    """
    lidar2ego, now, then = (np.asarray(matrix, dtype=np.float64)
                            for matrix in (lidar2ego, ego2global, frame_ego2global))
    return np.linalg.inv(lidar2ego) @ np.linalg.inv(then) @ now @ lidar2ego


def bda_matrix(angle: float, scale: float, flip_x: bool, flip_y: bool) -> np.ndarray:
    """Augmentation of the BEV plane: rotate counter-clockwise, then scale, then flip.

    Returns:
        Shape (3, 3), float32; `flip_x` negates x. z is scaled too.
    """
    cos, sin = np.cos(angle), np.sin(angle)
    rotation = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    flip = np.diag([-1.0 if flip_x else 1.0, -1.0 if flip_y else 1.0, 1.0])
    return (flip @ rotation * scale).astype(np.float32)


def warp_bev(bev: Tensor, bda_mat: Tensor, pc_range: Sequence[float],
             bev_size: Sequence[int]) -> Tensor:
    """Moves BEV features as `bda_mat` moves boxes: `out(p) = bev(bda_mat^-1 p)`, zero outside.

    Args:
        bev: shape (B, Hb * Wb, C).
        bda_mat: shape (B, 3, 3).
        pc_range, bev_size: as in :func:`cell_centers`.

    Returns:
        Shape (B, Hb * Wb, C), dtype of `bev`.
    """
    batch, _, channels = bev.shape
    rows, columns = bev_size
    target = cell_centers(pc_range, bev_size, bev.device)
    back = inverse(bda_mat.float())[:, None, :2, :2]  # (B, 1, 2, 2)
    source = (back * target[None, :, None]).sum(-1)  # (B, Q, 2), metres
    low, high = constant(source, pc_range[:2]), constant(source, pc_range[3:5])
    grid = (2 * (source - low) / (high - low) - 1).view(batch, rows, columns, 2)
    maps = bev.float().transpose(1, 2).reshape(batch, channels, rows, columns)
    out = F.grid_sample(maps, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
    return out.flatten(2).transpose(1, 2).to(bev.dtype)  # (B, C, Hb, Wb) -> (B, Hb*Wb, C)


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4), real part first, of any length."""
    norm = quaternion.norm(dim=-1, keepdim=True).clamp(min=1e-7)
    w, x, y, z = (quaternion / norm).unbind(-1)
    return torch.stack([
        1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)
    ], -1).unflatten(-1, (3, 3))


def unproject(pixels: Tensor, depths: Tensor, cam2img: Tensor) -> Tensor:
    """Camera points (n, 3) of pixels (n, 2) at depths (n,); `cam2img` has shape (n, 3, 3)."""
    rays = torch.cat([pixels, torch.ones_like(pixels[:, :1])], -1)
    return depths[:, None] * (inverse(cam2img) * rays[:, None]).sum(-1)


def ray_rotation(rays: Tensor) -> Tensor:
    """Rotation that turns the optical axis into a ray, without roll.

    Args:
        rays: shape (n, 3), camera frame, of any length, not along the y axis.

    Returns:
        Shape (n, 3, 3), columns x, y, z.
    """
    z = F.normalize(rays, dim=-1)
    down = torch.zeros_like(z)
    down[:, 1] = 1
    y = F.normalize(down - z[:, 1:2] * z, dim=-1)
    return torch.stack([torch.linalg.cross(y, z, dim=-1), y, z], -1)


def allocentric_to_egocentric(rotation: Tensor, rays: Tensor) -> Tensor:
    """Object-to-camera rotations (n, 3, 3) from those relative to the viewing ray (n, 3)."""
    return ray_rotation(rays) @ rotation


def box_corners(centers: Tensor, sizes: Tensor, rotations: Tensor) -> Tensor:
    """Corners of boxes.

    Args:
        centers: shape (n, 3).
        sizes: shape (n, 3): width, length, height.
        rotations: shape (n, 3, 3); the object's x axis is its length, y its width, z its height.

    Returns:
        Shape (n, 8, 3).
    """
    index = torch.arange(8, device=centers.device)
    signs = torch.stack([index // 4, index // 2 % 2, index % 2], -1).to(centers.dtype) - 0.5
    lwh = torch.cat([sizes[:, 1:2], sizes[:, :1], sizes[:, 2:]], -1)
    corners = signs * lwh[:, None]  # (n, 8, 3), object frame
    return (rotations[:, None] * corners[:, :, None]).sum(-1) + centers[:, None]


def yaw_rotation(yaw: Tensor) -> Tensor:
    """Rotations (n, 3, 3) about z by `yaw`, counter-clockwise."""
    cos, sin, zero, one = yaw.cos(), yaw.sin(), torch.zeros_like(yaw), torch.ones_like(yaw)
    return torch.stack([cos, -sin, zero, sin, cos, zero, zero, zero, one],
                       -1).unflatten(-1, (3, 3))


def lidar_boxes_to_camera(boxes: Tensor, lidar2cam: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of the LiDAR frame as the perspective head describes them.

    Args:
        boxes: shape (n, 7): x, y, z of the gravity centre, length, width, height, yaw.
        lidar2cam: shape (4, 4).

    Returns:
        Centres (n, 3), sizes (n, 3) as width, length, height, rotations (n, 3, 3), camera frame.
    """
    rotation = lidar2cam[:3, :3]
    centers = boxes[:, :3] @ rotation.T + lidar2cam[:3, 3]
    return centers, boxes[:, [4, 3, 5]], rotation @ yaw_rotation(boxes[:, 6])


def camera_boxes_to_lidar(centers: Tensor, sizes: Tensor, rotations: Tensor,
                          lidar2cam: Tensor) -> Tensor:
    """Boxes (n, 7) of the LiDAR frame; the inverse of :func:`lidar_boxes_to_camera`.

    `lidar2cam` has shape (n, 4, 4). Pitch and roll are dropped.
    """
    cam2lidar = inverse(lidar2cam)
    centers = (cam2lidar[:, :3, :3] * centers[:, None]).sum(-1) + cam2lidar[:, :3, 3]
    heading = (cam2lidar[:, :3, :3] @ rotations)[:, :, 0]
    yaw = torch.atan2(heading[:, 1], heading[:, 0])
    return torch.cat([centers, sizes[:, 1:2], sizes[:, :1], sizes[:, 2:], yaw[:, None]], -1)
