# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A small data set in nuScenes layout: six cameras in a ring, moving cuboids, a turning car.

python tools/dataset_converters/synthetic_rig.py data/synthetic-rig

writes `samples/<camera>/*.jpg`, `synthetic_infos.pkl` (version 1.1, with links between samples)
and the tables of the nuScenes devkit under `v1.0-mini`, so that its metric runs. The same
arguments give the same files, bit by bit.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from .synthetic_rig_tables import write_tables

CAMERAS = {'CAM_FRONT': 0, 'CAM_FRONT_RIGHT': -60, 'CAM_FRONT_LEFT': 60, 'CAM_BACK': 180,
           'CAM_BACK_LEFT': 120, 'CAM_BACK_RIGHT': -120}  # degrees to the left of straight ahead
CLASSES = ('car', 'truck', 'trailer', 'bus', 'construction_vehicle', 'bicycle', 'motorcycle',
           'pedestrian', 'traffic_cone', 'barrier')  # the order of info files
# length, width, height in metres; colour (BGR); attribute of an object that stands or moves
KINDS = {
    'car': ((4.6, 2.0, 1.7), (40, 40, 220), (6, 5)),
    'truck': ((6.9, 2.5, 2.8), (220, 80, 40), (6, 5)),
    'bicycle': ((1.7, 0.6, 1.3), (60, 200, 60), (1, 1)),
    'pedestrian': ((0.8, 0.8, 1.8), (220, 60, 200), (3, 2)),
    'barrier': ((0.5, 2.4, 1.0), (40, 200, 220), (8, 8)),
    'bus': ((10.0, 2.8, 3.3), (40, 140, 240), (7, 5)),
    'traffic_cone': ((0.5, 0.5, 1.1), (20, 90, 255), (8, 8)),
    'motorcycle': ((2.1, 0.8, 1.4), (200, 200, 40), (1, 1)),
    'trailer': ((9.0, 2.7, 3.6), (120, 60, 120), (6, 5)),
    'construction_vehicle': ((6.2, 2.7, 3.0), (30, 220, 140), (6, 5)),
}
WIDTH, HEIGHT, FOCAL = 320, 160, 190.0  # pixels
PERIOD = 0.5  # seconds between key frames
_NEAR = 0.1  # metres


@dataclass(frozen=True)
class Cuboid:
    """An object: class, centre (x, y, z) at time 0, yaw and velocity (x, y), in world axes."""

    name: str
    center: np.ndarray
    yaw: float
    velocity: np.ndarray

    @property
    def size(self) -> np.ndarray:
        """Length, width, height."""
        return np.array(KINDS[self.name][0])

    def at(self, time: float) -> np.ndarray:
        """Centre after `time` seconds."""
        return self.center + time * np.append(self.velocity, 0.0)


def pose(yaw: float, translation: tuple[float, float, float]) -> np.ndarray:
    """4x4 matrix of a turn about z and a shift."""
    matrix = np.eye(4)
    matrix[:2, :2] = [[np.cos(yaw), -np.sin(yaw)], [np.sin(yaw), np.cos(yaw)]]
    matrix[:3, 3] = translation
    return matrix


def camera2ego(degrees: float) -> np.ndarray:
    """Camera at the roof edge, looking `degrees` to the left and a little down."""
    angle, pitch = np.deg2rad(degrees), np.deg2rad(3.0)
    forward = np.array([np.cos(angle) * np.cos(pitch), np.sin(angle) * np.cos(pitch),
                        -np.sin(pitch)])
    right = np.array([np.sin(angle), -np.cos(angle), 0.0])
    matrix = np.eye(4)
    matrix[:3, :3] = np.stack([right, np.cross(forward, right), forward], 1)
    matrix[:3, 3] = [0.9 + 0.6 * np.cos(angle), 0.6 * np.sin(angle), 1.7]
    return matrix


LIDAR2EGO = pose(-np.pi / 2, (0.9, 0.0, 1.8))  # LiDAR: x right, y forward
CAM2IMG = np.array([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])


def ego2global(scene: int, time: float) -> np.ndarray:
    """A left-hand curve that starts a kilometre from the origin."""
    yaw = 0.4 + scene + 0.25 * time
    return pose(yaw, (1000.0 + 400 * scene + 4 * time, 1600.0 + 1.5 * time * time, 0.0))


def make_objects(scene: int, count: int, moving: Collection[str] = ('car', 'pedestrian'),
                 speeds: tuple[float, float] = (1, 4)) -> list[Cuboid]:
    """Cuboids around the first position of the car, apart from each other; all stand on ground."""
    rng = np.random.default_rng(100 + scene)
    start = ego2global(scene, 0.0)
    names = list(KINDS)
    objects = []
    for index in range(count):
        angle = 2 * np.pi * (index + rng.uniform(-0.25, 0.25)) / count
        distance = rng.uniform(7, 17)
        name = names[(index + 5 * scene) % len(names)]
        height = KINDS[name][0][2]
        center = start @ [distance * np.cos(angle), distance * np.sin(angle), height / 2, 1]
        yaw = rng.uniform(-np.pi, np.pi)
        speed = rng.uniform(*speeds) if name in moving else 0.0
        objects.append(Cuboid(name, center[:3], yaw,
                              speed * np.array([np.cos(yaw), np.sin(yaw)])))
    return objects


def turned_back(item: Cuboid, time: float) -> Cuboid:
    """The object that is at the same place at `time` and moves the other way."""
    return replace(item, center=item.at(2 * time), velocity=-item.velocity)


def corners(size: np.ndarray, transform: np.ndarray) -> np.ndarray:
    """Corners (8, 3) of a box of this size, from object axes by a 4x4 matrix."""
    signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)]) / 2
    return (signs * size) @ transform[:3, :3].T + transform[:3, 3]


FACES = ((0, 1, 3, 2), (4, 5, 7, 6), (0, 1, 5, 4), (2, 3, 7, 6), (0, 2, 6, 4), (1, 3, 7, 5))


def clip_near(face: np.ndarray) -> np.ndarray:
    """The part of a polygon (n, 3) with z >= _NEAR."""
    out = []
    for current, following in zip(face, np.roll(face, -1, axis=0)):
        if current[2] >= _NEAR:
            out.append(current)
        if (current[2] >= _NEAR) != (following[2] >= _NEAR):
            part = (_NEAR - current[2]) / (following[2] - current[2])
            out.append(current + part * (following - current))
    return np.array(out).reshape(-1, 3)


def render(boxes: list[tuple[str, np.ndarray]]) -> np.ndarray:
    """Picture of boxes (class, corners (8, 3) in camera axes): far faces first."""
    image = np.full((HEIGHT, WIDTH, 3), (200, 190, 180), np.uint8)
    image[HEIGHT // 2:] = (110, 115, 110)
    faces = [(name, side, box[list(indices)]) for name, box in boxes
             for side, indices in enumerate(FACES)]
    for name, side, face in sorted(faces, key=lambda item: -np.linalg.norm(item[2].mean(0))):
        face = clip_near(face)
        if len(face) >= 3:
            pixels = face @ CAM2IMG.T
            pixels = np.clip(pixels[:, :2] / pixels[:, 2:], -2000, 2000)
            colour = np.array(KINDS[name][1]) * (0.6 + 0.08 * side)
            cv2.fillConvexPoly(image, np.round(pixels).astype(np.int32), colour.tolist())
    return image


def instance_of(item: Cuboid, time: float, lidar2global: np.ndarray) -> dict:
    """An entry of `instances`."""
    global2lidar = np.linalg.inv(lidar2global)
    center = global2lidar @ np.append(item.at(time), 1.0)
    yaw = item.yaw - np.arctan2(lidar2global[1, 0], lidar2global[0, 0])
    velocity = global2lidar[:2, :2] @ item.velocity
    return dict(name=item.name, yaw=item.yaw, center=item.at(time).tolist(),
                attribute=KINDS[item.name][2][bool(np.any(item.velocity))],
                bbox_label=CLASSES.index(item.name), bbox_label_3d=CLASSES.index(item.name),
                bbox_3d=[*center[:3].tolist(), *item.size.tolist(), float(yaw)],
                bbox_3d_isvalid=True, num_lidar_pts=20, num_radar_pts=1,
                velocity=velocity.tolist())


def camera_instance_of(item: Cuboid, instance: dict, lidar2cam: np.ndarray) -> dict | None:
    """An entry of `cam_instances`, None where the camera does not see the centre."""
    center = lidar2cam @ np.append(instance['bbox_3d'][:3], 1.0)
    pixel = CAM2IMG @ center[:3]
    if center[2] < 1 or not (0 < pixel[0] < WIDTH * pixel[2] and 0 < pixel[1] < HEIGHT * pixel[2]):
        return None
    box = corners(item.size, lidar2cam @ pose(instance['bbox_3d'][6], instance['bbox_3d'][:3]))
    box = box @ CAM2IMG.T
    box = box[:, :2] / box[:, 2:].clip(_NEAR)
    low, high = box.min(0).clip(0), np.minimum(box.max(0), [WIDTH, HEIGHT])
    heading = lidar2cam[:3, :3] @ [np.cos(instance['bbox_3d'][6]),
                                   np.sin(instance['bbox_3d'][6]), 0]
    length, width, height = item.size.tolist()
    velocity = lidar2cam[:3, :2] @ instance['velocity']
    moves = bool(np.any(item.velocity))
    return dict(bbox=[*low.tolist(), *high.tolist()], bbox_label=instance['bbox_label'],
                bbox_label_3d=instance['bbox_label_3d'], bbox_3d_isvalid=True,
                bbox_3d=[*center[:3].tolist(), length, height, width,
                         float(-np.arctan2(heading[2], heading[0]))],
                velocity=[float(velocity[0]), float(velocity[2])],
                center_2d=(pixel[:2] / pixel[2]).tolist(), depth=float(center[2]),
                attr_label=KINDS[item.name][2][moves])


def make_sample(root: Path, scene: int, frame: int, objects: list[Cuboid], drive: int) -> dict:
    """Draws the six images of a key frame and returns its info, without links."""
    time = frame * PERIOD
    lidar2global = ego2global(drive, time) @ LIDAR2EGO
    token = f'sample-{scene}-{frame}'
    instances = [instance_of(item, time, lidar2global) for item in objects]
    images, cam_instances = {}, {}
    for camera, degrees in CAMERAS.items():
        cam2ego = camera2ego(degrees)
        lidar2cam = np.linalg.inv(cam2ego) @ LIDAR2EGO
        boxes = [(item.name, corners(item.size, lidar2cam @ pose(
            instance['bbox_3d'][6], instance['bbox_3d'][:3])))
            for item, instance in zip(objects, instances)]
        path = root / 'samples' / camera / f'{token}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), render(boxes))
        images[camera] = dict(
            img_path=path.name, cam2img=CAM2IMG.tolist(), lidar2cam=lidar2cam.tolist(),
            cam2ego=cam2ego.tolist(), timestamp=time, sample_data_token=f'{token}-{camera}')
        found = [camera_instance_of(item, instance, lidar2cam)
                 for item, instance in zip(objects, instances)]
        cam_instances[camera] = [item for item in found if item is not None]
    sweep = root / 'samples' / 'LIDAR_TOP' / f'{token}.bin'  # the corners: x, y, z, 0, 0
    sweep.parent.mkdir(parents=True, exist_ok=True)
    points = [corners(item.size, pose(instance['bbox_3d'][6], instance['bbox_3d'][:3]))
              for item, instance in zip(objects, instances)]
    np.pad(np.concatenate(points), ((0, 0), (0, 2))).astype('<f4').tofile(sweep)
    return dict(token=token, timestamp=time, ego2global=ego2global(drive, time).tolist(),
                lidar_points=dict(lidar_path=f'{token}.bin', num_pts_feats=5,
                                  lidar2ego=LIDAR2EGO.tolist()),
                images=images, instances=instances, cam_instances=cam_instances)


def write(root: Path, num_scenes: int = 2, num_frames: int = 2, num_objects: int = 8,
          with_links: bool = True, twins: bool = False) -> Path:
    """Writes the data set; returns the path of the info file.

    Twins are pairs of scenes in which everything moves, in one of them the other way. Their last
    key frames show the same images: only what was before tells the velocities.

    Args:
        root: folder, made if needed.
        num_scenes, num_frames: scenes and key frames in each.
        num_objects: cuboids per scene.
        with_links: put `scene_token`, `prev`, `next` into the info file as well.
        twins: every other scene is the twin of the one before.
    """
    data_list: list[dict] = []
    links: list[dict] = []
    for scene in range(num_scenes):
        drive = scene // 2 if twins else scene
        objects = (make_objects(drive, num_objects, KINDS, (4, 8)) if twins
                   else make_objects(drive, num_objects))
        if twins and scene % 2:
            objects = [turned_back(item, (num_frames - 1) * PERIOD) for item in objects]
        for frame in range(num_frames):
            info = make_sample(root, scene, frame, objects, drive)
            links.append(dict(
                token=info['token'], scene_token=f'scene-{scene}',
                prev=f'sample-{scene}-{frame - 1}' if frame else '',
                next=f'sample-{scene}-{frame + 1}' if frame + 1 < num_frames else ''))
            extra = links[-1] if with_links else {}
            data_list.append(dict(sample_idx=len(data_list), **{**info, **extra}))
    metainfo = dict(dataset='nuscenes', version='v1.0-mini', info_version='1.1',
                    categories={name: index for index, name in enumerate(CLASSES)})
    write_tables(root, data_list, links, CLASSES)
    path = root / 'synthetic_infos.pkl'
    path.write_bytes(pickle.dumps(dict(metainfo=metainfo, data_list=data_list)))
    return path
