# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A small dataset in nuScenes layout: cameras in a ring, moving cuboids, a turning car.

python tools/dataset_converters/synthetic_rig.py data/synthetic-rig

writes `samples/<camera>/*.jpg`, `synthetic_infos.pkl` (version 1.1, with links between samples)
and the tables of the nuScenes devkit under `v1.0-mini`, so that its metric runs. The same
arguments give the same files, bit by bit. Another number of cameras and classes of other names
make a dataset of one's own: `--cameras 4 --classes car tram tree`.
"""

from __future__ import annotations

import colorsys
import pickle
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Optional

import cv2
import numpy as np

from .synthetic_rig_tables import SCENES, write_tables

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
Kind = tuple[tuple[float, float, float], tuple[int, int, int], tuple[int, int]]  # as in KINDS
_NO_ATTRIBUTE = 8


@dataclass(frozen=True)
class Cuboid:
    """An object: class, centre (x, y, z) at time 0, yaw and velocity (x, y), in world axes.

    `size` is length, width, height in metres.
    """

    name: str
    center: np.ndarray
    yaw: float
    velocity: np.ndarray
    size: np.ndarray

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


def camera_ring(count: int) -> dict[str, float]:
    """Names of cameras and where they look: the six of nuScenes, or CAM_0 ahead, clockwise."""
    if count == len(CAMERAS):
        return dict(CAMERAS)
    return {f'CAM_{index}': -360 / count * index for index in range(count)}


def intrinsics(count: int) -> np.ndarray:
    """Intrinsics with which `count` cameras see all around; one or two look 120 degrees wide."""
    angle = np.deg2rad(min(120, 360 / count + 20))
    matrix = CAM2IMG.copy()
    matrix[0, 0] = matrix[1, 1] = min(FOCAL, WIDTH / 2 / np.tan(angle / 2))
    return matrix


def kinds_of(classes: Sequence[str]) -> dict[str, Kind]:
    """What the classes look like: those of nuScenes as there, others in colours of their own."""
    sizes = [kind[0] for kind in KINDS.values()]
    kinds: dict[str, Kind] = {}
    for index, name in enumerate(classes):
        red, green, blue = (round(255 * part) for part in colorsys.hsv_to_rgb(
            index / len(classes), 0.8, 0.9))
        own = (sizes[index % len(sizes)], (blue, green, red), (_NO_ATTRIBUTE, _NO_ATTRIBUTE))
        kinds[name] = KINDS.get(name, own)
    return kinds


@dataclass(frozen=True)
class Rig:
    """Cameras and classes of a dataset.

    Attributes:
        cameras: name to degrees to the left of straight ahead.
        cam2img: shape (3, 3), of all cameras.
        kinds: class to size, colour and attributes.
        classes: names in the order of the labels.
    """

    cameras: dict[str, float] = field(default_factory=lambda: dict(CAMERAS))
    cam2img: np.ndarray = field(default_factory=CAM2IMG.copy)
    kinds: dict[str, Kind] = field(default_factory=lambda: dict(KINDS))
    classes: tuple[str, ...] = CLASSES

    @classmethod
    def of(cls, num_cameras: int, classes: Optional[Sequence[str]]) -> Rig:
        """The rig with so many cameras and these classes; None means those of nuScenes.

        Raises:
            ValueError: no camera, or a class without a name or twice.
        """
        if num_cameras < 1:
            raise ValueError(f'num_cameras must be 1 or more, got {num_cameras}')
        if classes is None:
            return cls(camera_ring(num_cameras), intrinsics(num_cameras))
        if not classes or len(set(classes)) < len(classes) or not all(classes):
            raise ValueError(f'classes must be different names, got {classes}')
        return cls(camera_ring(num_cameras), intrinsics(num_cameras), kinds_of(classes),
                   tuple(classes))

    @property
    def moving(self) -> tuple[str, ...]:
        """Classes whose objects move: cars and pedestrians, of others every second one."""
        if self.classes == CLASSES:
            return ('car', 'pedestrian')
        return self.classes[::2]


def ego2global(scene: int, time: float) -> np.ndarray:
    """A left-hand curve that starts a kilometre from the origin."""
    yaw = 0.4 + scene + 0.25 * time
    return pose(yaw, (1000.0 + 400 * scene + 4 * time, 1600.0 + 1.5 * time * time, 0.0))


def make_objects(scene: int, count: int, moving: Collection[str] = ('car', 'pedestrian'),
                 speeds: tuple[float, float] = (1, 4),
                 kinds: Optional[dict[str, Kind]] = None) -> list[Cuboid]:
    """Cuboids around the first position of the car, apart from each other; all stand on ground."""
    kinds = KINDS if kinds is None else kinds
    rng = np.random.default_rng(100 + scene)
    start = ego2global(scene, 0.0)
    names = list(kinds)
    objects = []
    for index in range(count):
        angle = 2 * np.pi * (index + rng.uniform(-0.25, 0.25)) / count
        distance = rng.uniform(7, 17)
        name = names[(index + 5 * scene) % len(names)]
        height = kinds[name][0][2]
        center = start @ [distance * np.cos(angle), distance * np.sin(angle), height / 2, 1]
        yaw = rng.uniform(-np.pi, np.pi)
        speed = rng.uniform(*speeds) if name in moving else 0.0
        objects.append(Cuboid(name, center[:3], yaw,
                              speed * np.array([np.cos(yaw), np.sin(yaw)]),
                              np.array(kinds[name][0])))
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


def render(boxes: list[tuple[str, np.ndarray]], rig: Rig) -> np.ndarray:
    """Picture of boxes (class, corners (8, 3) in camera axes): far faces first."""
    image = np.full((HEIGHT, WIDTH, 3), (200, 190, 180), np.uint8)
    image[HEIGHT // 2:] = (110, 115, 110)
    faces = [(name, side, box[list(indices)]) for name, box in boxes
             for side, indices in enumerate(FACES)]
    for name, side, face in sorted(faces, key=lambda item: -np.linalg.norm(item[2].mean(0))):
        face = clip_near(face)
        if len(face) >= 3:
            pixels = face @ rig.cam2img.T
            pixels = np.clip(pixels[:, :2] / pixels[:, 2:], -2000, 2000)
            colour = np.array(rig.kinds[name][1]) * (0.6 + 0.08 * side)
            cv2.fillConvexPoly(image, np.round(pixels).astype(np.int32), colour.tolist())
    return image


def instance_of(item: Cuboid, time: float, lidar2global: np.ndarray, rig: Rig) -> dict:
    """An entry of `instances`."""
    global2lidar = np.linalg.inv(lidar2global)
    center = global2lidar @ np.append(item.at(time), 1.0)
    yaw = item.yaw - np.arctan2(lidar2global[1, 0], lidar2global[0, 0])
    velocity = global2lidar[:2, :2] @ item.velocity
    return dict(name=item.name, yaw=item.yaw, center=item.at(time).tolist(),
                attribute=rig.kinds[item.name][2][bool(np.any(item.velocity))],
                bbox_label=rig.classes.index(item.name),
                bbox_label_3d=rig.classes.index(item.name),
                bbox_3d=[*center[:3].tolist(), *item.size.tolist(), float(yaw)],
                bbox_3d_isvalid=True, num_lidar_pts=20, num_radar_pts=1,
                velocity=velocity.tolist())


def camera_instance_of(item: Cuboid, instance: dict, lidar2cam: np.ndarray,
                       rig: Rig) -> dict | None:
    """An entry of `cam_instances`, None where the camera does not see the centre."""
    center = lidar2cam @ np.append(instance['bbox_3d'][:3], 1.0)
    pixel = rig.cam2img @ center[:3]
    if center[2] < 1 or not (0 < pixel[0] < WIDTH * pixel[2] and 0 < pixel[1] < HEIGHT * pixel[2]):
        return None
    box = corners(item.size, lidar2cam @ pose(instance['bbox_3d'][6], instance['bbox_3d'][:3]))
    box = box @ rig.cam2img.T
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
                attr_label=rig.kinds[item.name][2][moves])


def make_sample(root: Path, scene: int, frame: int, objects: list[Cuboid], drive: int,
                rig: Rig) -> dict:
    """Draws the images of a key frame and returns its info, without links."""
    time = frame * PERIOD
    lidar2global = ego2global(drive, time) @ LIDAR2EGO
    token = f'sample-{scene}-{frame}'
    instances = [instance_of(item, time, lidar2global, rig) for item in objects]
    images, cam_instances = {}, {}
    for camera, degrees in rig.cameras.items():
        cam2ego = camera2ego(degrees)
        lidar2cam = np.linalg.inv(cam2ego) @ LIDAR2EGO
        boxes = [(item.name, corners(item.size, lidar2cam @ pose(
            instance['bbox_3d'][6], instance['bbox_3d'][:3])))
            for item, instance in zip(objects, instances)]
        path = root / 'samples' / camera / f'{token}.jpg'
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), render(boxes, rig))
        images[camera] = dict(
            img_path=path.name, cam2img=rig.cam2img.tolist(), lidar2cam=lidar2cam.tolist(),
            cam2ego=cam2ego.tolist(), timestamp=time, sample_data_token=f'{token}-{camera}')
        found = [camera_instance_of(item, instance, lidar2cam, rig)
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
          with_links: bool = True, twins: bool = False, num_cameras: int = len(CAMERAS),
          classes: Optional[Sequence[str]] = None, version: str = 'v1.0-mini') -> Path:
    """Writes the dataset; returns the path of the info file.

    Twins are pairs of scenes in which everything moves, in one of them the other way. Their last
    key frames show the same images: only what was before tells the velocities.

    Args:
        root: folder, made if needed.
        num_scenes, num_frames: scenes and key frames in each.
        num_objects: cuboids per scene.
        with_links: put `scene_token`, `prev`, `next` into the info file as well.
        twins: every other scene is the twin of the one before.
        num_cameras: in a ring; six have the names of nuScenes, others are CAM_0, CAM_1, ...
        classes: names, in the order of their labels; those of nuScenes by default. Every second
            one moves.
        version: of the tables, which tells the names of the first two scenes: 'v1.0-mini' (both
            in the devkit's `mini_val`), 'v1.0-trainval' (one in `train`, one in `val`) or
            'v1.0-test' (both in `test`, and no annotations in the tables).

    Raises:
        ValueError: no camera, classes that are no different names, or an unknown version.
    """
    rig = Rig.of(num_cameras, classes)
    if version not in SCENES:
        raise ValueError(f'version must be one of {list(SCENES)}, got {version!r}')
    data_list: list[dict] = []
    links: list[dict] = []
    for scene in range(num_scenes):
        drive = scene // 2 if twins else scene
        objects = (make_objects(drive, num_objects, rig.kinds, (4, 8), rig.kinds) if twins
                   else make_objects(drive, num_objects, rig.moving, kinds=rig.kinds))
        if twins and scene % 2:
            objects = [turned_back(item, (num_frames - 1) * PERIOD) for item in objects]
        for frame in range(num_frames):
            info = make_sample(root, scene, frame, objects, drive, rig)
            links.append(dict(
                token=info['token'], scene_token=f'scene-{scene}',
                prev=f'sample-{scene}-{frame - 1}' if frame else '',
                next=f'sample-{scene}-{frame + 1}' if frame + 1 < num_frames else ''))
            extra = links[-1] if with_links else {}
            data_list.append(dict(sample_idx=len(data_list), **{**info, **extra}))
    metainfo = dict(dataset='nuscenes', version=version, info_version='1.1',
                    categories={name: index for index, name in enumerate(rig.classes)})
    write_tables(root, data_list, links, rig.classes, version)
    path = root / 'synthetic_infos.pkl'
    path.write_bytes(pickle.dumps(dict(metainfo=metainfo, data_list=data_list)))
    return path
