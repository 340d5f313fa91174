# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Geometry against hand-worked numbers, NumPy, and the box classes of mmdet3d."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mmdcnv4.bevformer_v2 import geometry
from mmdcnv4.datasets import synthetic_rig

RANGE = (-51.2, -51.2, -5.0, 51.2, 51.2, 3.0)
CAM2IMG = torch.tensor([[200.0, 0, 130], [0, 190, 70], [0, 0, 1]])


def test_pillar_points():
    points = geometry.pillar_points(RANGE, (200, 200), 4)
    assert points.shape == (40000, 4, 3)
    torch.testing.assert_close(points[0, :, 2], torch.tensor([-4.5, -13 / 6, 1 / 6, 2.5]))
    torch.testing.assert_close(points[0, 0, :2], torch.tensor([-50.944, -50.944]))
    # one column further: x; one row further: y
    torch.testing.assert_close(points[1, 0, :2], torch.tensor([-50.432, -50.944]))
    torch.testing.assert_close(points[200, 0, :2], torch.tensor([-50.944, -50.432]))


def test_pillar_points_on_a_plane_that_is_not_square():
    points = geometry.pillar_points((0, -2, -1, 8, 4, 1), (3, 4), 2)
    torch.testing.assert_close(points[:, 0, :2].view(3, 4, 2)[2, 1], torch.tensor([3.0, 3.0]))
    assert points[0, :, 2].tolist() == [-0.5, 0.5]


def test_project_points():
    # a camera that looks along x of the LiDAR, 1 m above it
    lidar2cam = torch.tensor([[0.0, -1, 0, 0], [0, 0, -1, 1], [1, 0, 0, 0], [0, 0, 0, 1]])
    lidar2img = torch.eye(4)
    lidar2img[:3, :3] = CAM2IMG
    lidar2img = lidar2img @ lidar2cam
    points = torch.tensor([[[10.0, 2, 0]], [[-10, 2, 0]], [[10, 20, 0]], [[0, 0, 0]]])
    uv, is_visible = geometry.project_points(points, lidar2img[None, None], (160, 260))
    expected = torch.tensor([(200 * -2 / 10 + 130) / 260, (190 * 1 / 10 + 70) / 160])
    torch.testing.assert_close(uv[0, 0, 0, 0], expected)
    assert is_visible.flatten().tolist() == [True, False, False, False]
    assert uv.isfinite().all()


def test_padding_is_not_visible():
    """Points at pixels 100, 180 and 250 of a row; the images are 160 and 200 pixels wide."""
    lidar2img = torch.eye(4)
    lidar2img[:3, :3] = CAM2IMG
    points = torch.tensor([[[(x - 130) / 200, 0.0, 1]] for x in (100.0, 180, 250)])
    matrices = lidar2img.expand(2, 1, 4, 4)
    padded = geometry.project_points(points, matrices, (160, 260))
    uv, is_visible = geometry.project_points(points, matrices, (160, 260),
                                             torch.tensor([[160, 160], [160, 200]]))
    assert padded[1].all() and torch.equal(uv, padded[0])
    assert is_visible[:, 0, :, 0].tolist() == [[True, False, False], [True, True, False]]
    low = geometry.project_points(points, matrices, (160, 260), torch.tensor([[60, 260]] * 2))
    assert not low[1].any()  # the row is the 70th


def test_projection_is_that_of_numpy_for_every_sample():
    rng = np.random.default_rng(0)
    matrices = rng.normal(size=(2, 3, 4, 4)).astype(np.float32)
    points = rng.normal(size=(5, 2, 3)).astype(np.float32)
    uv, is_visible = geometry.project_points(torch.from_numpy(points), torch.from_numpy(matrices),
                                             (40, 60))
    for b, v, q, z in np.ndindex(2, 3, 5, 2):
        camera = matrices[b, v] @ np.append(points[q, z], 1)
        if camera[2] > 1e-2:
            pixel = camera[:2] / camera[2]
            np.testing.assert_allclose(uv[b, v, q, z], pixel / [60, 40], rtol=1e-4, atol=1e-5)
            assert is_visible[b, v, q, z] == (0 < pixel[0] < 60 and 0 < pixel[1] < 40)


def test_ego_motion():
    """A point that stands still, through the matrices of another frame and of the current one."""
    now, then = synthetic_rig.ego2global(0, 1.0), synthetic_rig.ego2global(0, 0.0)
    motion = geometry.current2frame(synthetic_rig.LIDAR2EGO, now, then)
    point = np.array([3.0, 12.0, -1.0, 1.0])  # current LiDAR frame
    world = now @ synthetic_rig.LIDAR2EGO @ point
    expected = np.linalg.inv(then @ synthetic_rig.LIDAR2EGO) @ world
    np.testing.assert_allclose(motion @ point, expected, atol=1e-8)
    assert np.abs(expected - point).max() > 1
    np.testing.assert_allclose(geometry.current2frame(synthetic_rig.LIDAR2EGO, now, now), np.eye(4),
                               atol=1e-9)


BDA = [(0.3, 1.0, False, False), (0.0, 1.05, False, False), (0.0, 1.0, True, False),
       (0.0, 1.0, False, True), (-0.4, 0.95, True, True), (0.35, 1.04, False, True)]


@pytest.mark.parametrize('angle, scale, flip_x, flip_y', BDA)
def test_bda_moves_boxes_and_features_alike(angle, scale, flip_x, flip_y):
    from mmdet3d.structures import LiDARInstance3DBoxes
    boxes = LiDARInstance3DBoxes(torch.tensor([[9.0, -4, -1, 4, 2, 1.5, 0.7, 1.0, 2.0]]),
                                 box_dim=9, origin=(0.5, 0.5, 0.5))
    start = boxes.gravity_center.clone()
    boxes.rotate(angle)
    boxes.scale(scale)
    if flip_x:
        boxes.flip('vertical')
    if flip_y:
        boxes.flip('horizontal')
    matrix = torch.from_numpy(geometry.bda_matrix(angle, scale, flip_x, flip_y))
    torch.testing.assert_close(boxes.gravity_center[0], matrix @ start[0])
    velocity = matrix @ torch.tensor([1.0, 2, 0])
    torch.testing.assert_close(boxes.tensor[0, 7:], velocity[:2])
    heading = matrix @ torch.tensor([np.cos(0.7), np.sin(0.7), 0]).float()
    yaw = float(boxes.yaw[0])
    torch.testing.assert_close(torch.tensor([np.cos(yaw), np.sin(yaw)]).float() * scale,
                               heading[:2], atol=1e-5, rtol=0)

    pc_range, bev_size = (-16.0, -16, -2, 16, 16, 2), (64, 64)  # cells of half a metre
    cells = geometry.cell_centers(pc_range, bev_size)
    blob = (-(cells - start[0, :2]).pow(2).sum(-1) / 2).exp()
    warped = geometry.warp_bev(blob[None, :, None], matrix[None], pc_range, bev_size)[0, :, 0]
    weight = warped / warped.sum()
    peak = (weight[:, None] * cells).sum(0)
    assert (peak - boxes.gravity_center[0, :2]).norm() < 0.15


def test_warp_on_a_plane_that_is_not_square_and_off_centre():
    pc_range, bev_size = (-4.0, -8, 0, 12, 8, 1), (8, 16)  # cells of 1 m by 2 m
    cells = geometry.cell_centers(pc_range, bev_size)
    bev = torch.stack([cells, cells + 1])  # batch of two: each cell holds its own place
    matrices = torch.from_numpy(np.stack([geometry.bda_matrix(0, 1.25, False, False),
                                          geometry.bda_matrix(0, 1, False, True)]))
    warped = geometry.warp_bev(bev, matrices, pc_range, bev_size)
    inner = (cells[:, 0].abs() < 4 / 1.25) & (cells[:, 1].abs() < 5)
    torch.testing.assert_close(warped[0, inner], cells[inner] / 1.25)
    torch.testing.assert_close(warped[1, inner], cells[inner] * torch.tensor([1, -1]) + 1)


def test_quaternion():
    angle = 0.6
    half = [np.cos(angle / 2), 0, 0, np.sin(angle / 2)]
    matrix = geometry.quaternion_to_matrix(3 * torch.tensor([half]).float())
    torch.testing.assert_close(matrix, geometry.yaw_rotation(torch.tensor([angle])))
    random = geometry.quaternion_to_matrix(torch.randn(5, 4))
    torch.testing.assert_close(random @ random.mT, torch.eye(3).expand(5, 3, 3))
    assert (torch.linalg.det(random) > 0.99).all()


def test_allocentric():
    torch.testing.assert_close(geometry.ray_rotation(torch.tensor([[0.0, 0, 7]])),
                               torch.eye(3)[None])
    # an object and its ray turned together about the camera's y axis look the same
    turn = geometry.ray_rotation(torch.tensor([[np.sin(0.5), 0.0, np.cos(0.5)]]).float())
    rotation = geometry.quaternion_to_matrix(torch.randn(1, 4))
    ray = torch.tensor([[0.2, 0.1, 1.0]])
    turned = (turn @ ray[..., None])[..., 0]
    torch.testing.assert_close(geometry.allocentric_to_egocentric(rotation, turned),
                               turn @ geometry.allocentric_to_egocentric(rotation, ray))


def test_unproject_inverts_the_projection():
    points = torch.tensor([[1.0, -2, 8], [0.5, 0.25, 30]])
    pixels = points @ CAM2IMG.T
    back = geometry.unproject(pixels[:, :2] / pixels[:, 2:], points[:, 2],
                              CAM2IMG.expand(2, 3, 3))
    torch.testing.assert_close(back, points)


def test_lidar_box_to_camera_and_back():
    from mmdet3d.structures import LiDARInstance3DBoxes
    tensor = torch.tensor([[4.0, 9, -0.5, 4.5, 1.9, 1.6, 0.8], [-7, 2, 0, 0.7, 0.8, 1.7, -2.5]])
    ego2camera = np.linalg.inv(synthetic_rig.camera2ego(-60))
    lidar2cam = torch.from_numpy(ego2camera @ synthetic_rig.LIDAR2EGO).float()
    centers, sizes, rotations = geometry.lidar_boxes_to_camera(tensor, lidar2cam)
    assert sizes[0].tolist() == pytest.approx([1.9, 4.5, 1.6])
    corners = geometry.box_corners(centers, sizes, rotations)
    boxes = LiDARInstance3DBoxes(tensor, origin=(0.5, 0.5, 0.5))
    expected = boxes.corners @ lidar2cam[:3, :3].T + lidar2cam[:3, 3]
    assert torch.cdist(corners, expected).amin(2).max() < 1e-4  # the same corners in any order
    back = geometry.camera_boxes_to_lidar(centers, sizes, rotations, lidar2cam.expand(2, 4, 4))
    torch.testing.assert_close(back, tensor, atol=1e-4, rtol=0)
