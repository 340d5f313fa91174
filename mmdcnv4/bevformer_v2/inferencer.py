# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""BEVFormer v2 on a stream of images: a call per point in time, the history is kept here."""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from mmdet3d.registry import MODELS
from mmdet3d.structures import get_box_type
from mmdet3d.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope

from ..checks.weights import Shapes, check_match
from ..errors import InvalidType, InvalidValue, MissingKey
from ..models.checkpoint import find_state_dict, read_file
from .data.transforms import LoadTemporalMultiViewImages

_TOLERANCE = 1e-3  # of a rotation: info files hold float32


def _matrix(name: str, value: Any, side: int) -> np.ndarray:
    """A finite square matrix as float64."""
    matrix = np.asarray(value, dtype=np.float64)
    if matrix.shape != (side, side) or not np.isfinite(matrix).all():
        raise InvalidValue(f'{name} must be a finite matrix of shape ({side}, {side}), got '
                           f'{matrix.tolist()}')
    return matrix


def _pose(name: str, value: Any) -> np.ndarray:
    """A 4x4 matrix that turns and shifts, and does nothing else."""
    matrix = _matrix(name, value, 4)
    turn = matrix[:3, :3]
    is_rigid = (np.abs(turn @ turn.T - np.eye(3)).max() < _TOLERANCE and np.linalg.det(turn) > 0
                and np.abs(matrix[3] - [0, 0, 0, 1]).max() < _TOLERANCE)
    if not is_rigid:
        raise InvalidValue(f'{name} must be a rotation and a translation in the last column, '
                           f'without scale or mirror, got {matrix.tolist()}')
    return matrix


@dataclass(frozen=True)
class Calibration:
    """Where the sensors are. `<a>2<b>` turns a point of frame a into a point of frame b; metres.

    The LiDAR frame is where boxes are predicted: x right, y ahead, z up in nuScenes. A rig without
    LiDAR takes any frame with these axes that is fixed to the vehicle.

    Attributes:
        lidar2ego: shape (4, 4).
        cam2img: camera to its intrinsics, shape (3, 3), in pixels of the images as they are given.
        lidar2cam: camera to a matrix of shape (4, 4); a camera looks along z, x is right, y down.

    Raises:
        ValueError: a matrix is not of this kind; the message names it.
    """

    lidar2ego: np.ndarray
    cam2img: Mapping[str, np.ndarray]
    lidar2cam: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        _pose('Calibration: lidar2ego', self.lidar2ego)
        for camera, matrix in self.cam2img.items():
            _matrix(f'Calibration: cam2img[{camera!r}]', matrix, 3)
        for camera, matrix in self.lidar2cam.items():
            _pose(f'Calibration: lidar2cam[{camera!r}]', matrix)

    @classmethod
    def from_cam2ego(cls, lidar2ego: np.ndarray, cam2img: Mapping[str, np.ndarray],
                     cam2ego: Mapping[str, np.ndarray]) -> Calibration:
        """From the poses of the cameras on the vehicle, shape (4, 4) each."""
        poses = {camera: _pose(f'Calibration: cam2ego[{camera!r}]', matrix)
                 for camera, matrix in cam2ego.items()}
        return cls(lidar2ego, cam2img, {camera: np.linalg.inv(pose) @ np.asarray(lidar2ego)
                                        for camera, pose in poses.items()})

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> Calibration:
        """From a sample of an info file of mmdetection3d 1.x."""
        views = info['images']
        return cls(np.asarray(info['lidar_points']['lidar2ego']),
                   {camera: np.asarray(view['cam2img'])[:3, :3] for camera, view in views.items()},
                   {camera: np.asarray(view['lidar2cam']) for camera, view in views.items()})


class BEVInferencer:
    """Boxes from images, call by call; of each frame the image maps are computed once.

    The result of a call is, to the last bit, that of the test loop on the same sample.

    Args:
        model: a `BEVFormerV2` with its weights; it is set to evaluation mode, and the cache of its
            maps is switched on.
        pipeline: of a test dataset: its configs.
        classes: names of the labels.
        interval: seconds between the frames that the model was trained on, 0.5 in nuScenes. The
            frame k of the history is the call nearest to k intervals from now, if it is less than
            half an interval off. None: every call is the next frame, whatever its time.
        max_gap: seconds between calls after which the history is dropped; three intervals by
            default.

    Raises:
        ValueError: the model looks into the future, or an argument is out of range; the message
            names it.

    Example:
        >>> inferencer = BEVInferencer.from_config('config.py', 'weights.pth', device='cuda:0')
        >>> found = inferencer.infer(images, calibration, ego_pose, timestamp)
        >>> found.pred_instances_3d.bboxes_3d.gravity_center  # (n, 3), LiDAR frame, metres
    """

    def __init__(self, model: Any, pipeline: Sequence[dict], classes: Sequence[str],
                 interval: Optional[float] = 0.5, max_gap: Optional[float] = None) -> None:
        self.frames: tuple[int, ...] = tuple(model.frames)
        if self.frames[-1] > 0:
            raise InvalidValue('BEVInferencer: model.frames must not lie in the future of a call, '
                               f'got {self.frames}; such a model is run with tools/test.py')
        if interval is not None and not interval > 0:
            raise InvalidValue(f'BEVInferencer: interval must be > 0 seconds or None, got '
                               f'{interval}')
        max_gap = 3 * (interval or 0.5) if max_gap is None else max_gap
        if not max_gap > 0:
            raise InvalidValue(f'BEVInferencer: max_gap must be > 0 seconds, got {max_gap}')
        self.classes, self.interval, self.max_gap = tuple(classes), interval, max_gap
        with DefaultScope.overwrite_default_scope('mmdet3d'):
            self._pipeline = Compose(pipeline)
        loaders = [step for step in self._pipeline.transforms
                   if isinstance(step, LoadTemporalMultiViewImages)]
        if not loaders:
            raise InvalidValue('BEVInferencer: pipeline must contain LoadTemporalMultiViewImages, '
                               f'got {[step["type"] for step in pipeline]}')
        self.cameras = loaders[0].cameras
        self.model = model.eval()
        self._calls = 0  # tokens are never used again: maps are known by them
        self._scene: Hashable = None
        self._last: Optional[float] = None  # seconds
        self._history: list[dict] = []

    @classmethod
    def from_config(cls, config: Union[str, Path, Config], checkpoint: str,
                    device: str = 'cpu', **options: Any) -> BEVInferencer:
        """Builds the model of a config, with its test pipeline.

        Args:
            config: path, or the config itself.
            checkpoint: path or URL; read without running code from it.
            device: 'cpu', 'cuda:0', ...
            options: `interval` and `max_gap` of the class.

        Raises:
            ValueError: the weights are not those of the model, in name and shape; the message
                lists tensors and entries of the config. Parts that the model has not at all, as
                heads for training, are no fault.
            FileNotFoundError: there is no such file.
        """
        cfg = config if isinstance(config, Config) else Config.fromfile(config)
        register_all_modules(init_default_scope=False)
        with DefaultScope.overwrite_default_scope('mmdet3d'):
            model = revert_sync_batchnorm(MODELS.build(cfg.model))
        content = read_file(checkpoint)
        weights = {name.removeprefix('module.'): tensor
                   for name, tensor in find_state_dict(content, checkpoint).items()}
        check_match(model, Shapes.of({**content, 'state_dict': weights}), checkpoint, cfg)
        model.load_state_dict(weights, strict=False)  # parts that the model has not are left over
        dataset = cfg.test_dataloader.dataset
        return cls(model.to(device), dataset.pipeline, dataset.metainfo.classes, **options)

    def reset(self) -> None:
        """Forgets the history, before images of another scene."""
        self._last = None
        self._history.clear()
        self.model.map_cache.clear()

    @torch.no_grad()
    def infer(self, images: Mapping[str, np.ndarray], calibration: Calibration,
              ego_pose: np.ndarray, timestamp: float, scene: Hashable = None) -> Any:
        """Boxes at one point in time.

        Args:
            images: camera to an image of shape (H, W, 3), uint8, BGR as OpenCV reads it, of the
                size that the pipeline crops. Cameras that the model does not know are left alone.
            calibration: of these images.
            ego_pose: ego2global, shape (4, 4), metres: the vehicle in a frame that does not move.
            timestamp: seconds; later than that of the call before.
            scene: anything that differs between scenes; the history is dropped when it changes.

        Returns:
            A `Det3DDataSample` on the device of the model. `pred_instances_3d` has `bboxes_3d`
            (`LiDARInstance3DBoxes`, 9 columns: x, y, z of the bottom, length, width, height in
            metres, yaw in radians counter-clockwise from x, velocity x, y in m/s), `scores_3d`
            and `labels_3d`, indices into `classes`, best scores first. `frame_valid` in its
            metainfo tells which frames of the model there were.

        Raises:
            KeyError: an image or a matrix of a camera is missing.
            TypeError: an image is no array of bytes.
            ValueError: another shape, no rigid pose, or a time that is not later.
        """
        self._check_time(timestamp, scene)
        info = self._info(images, calibration, ego_pose, timestamp)
        infos = [info if offset == 0 else self._past(offset, timestamp) for offset in self.frames]
        box_type, box_mode = get_box_type('LiDAR')
        results = dict(
            info, sample_idx=self._calls, frames=self.frames, frame_infos=infos,
            classes=self.classes, lidar_points=dict(lidar2ego=calibration.lidar2ego),
            box_type_3d=box_type, box_mode_3d=box_mode)
        batch = pseudo_collate([self._pipeline(results)])
        self.model.map_cache.capacity = len(self._history) + 1 if len(self.frames) > 1 else 0
        found = self.model.test_step(batch)[0]
        self._last = timestamp
        self._history = self._still_needed([*self._history, info])
        return found

    def _check_time(self, timestamp: float, scene: Hashable) -> None:
        """Drops the history where it does not lead up to this call."""
        if not math.isfinite(timestamp):
            raise InvalidValue(f'BEVInferencer: timestamp must be a number of seconds, got '
                               f'{timestamp}')
        if scene != self._scene:
            self.reset()
        self._scene = scene
        if self._last is None:
            return
        gap = timestamp - self._last
        if gap <= 0:
            raise InvalidValue(
                'BEVInferencer: timestamp must be later than that of the call before, '
                f'{self._last} seconds, got {timestamp}; call reset() before images of another '
                'scene, or name the scene')
        if gap > self.max_gap:
            print_log(f'BEVInferencer: {gap:g} seconds passed since the call before, more than '
                      f'max_gap={self.max_gap:g}: the history is dropped', logger='current',
                      level=logging.WARNING)
            self.reset()

    def _info(self, images: Mapping[str, np.ndarray], calibration: Calibration,
              ego_pose: np.ndarray, timestamp: float) -> dict:
        """The call as an entry of an info file, with the images in it."""
        views = {}
        for camera in self.cameras:
            for name, given in (('images', images), ('calibration.cam2img', calibration.cam2img),
                                ('calibration.lidar2cam', calibration.lidar2cam)):
                if camera not in given:
                    raise MissingKey(f'BEVInferencer: {name} must have the cameras '
                                     f'{", ".join(self.cameras)}, got {sorted(given)}')
            image = images[camera]
            if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
                raise InvalidType(f'BEVInferencer: images[{camera!r}] must be a numpy array of '
                                  f'uint8, got {getattr(image, "dtype", type(image).__name__)}')
            if image.ndim != 3 or image.shape[2] != 3:
                raise InvalidValue(f'BEVInferencer: images[{camera!r}] must have shape (H, W, 3), '
                                   f'got {image.shape}')
            views[camera] = dict(img=image.copy(), cam2img=calibration.cam2img[camera],
                                 lidar2cam=calibration.lidar2cam[camera])
        self._calls += 1
        return dict(images=views, ego2global=_pose('BEVInferencer: ego_pose', ego_pose),
                    timestamp=timestamp, token=f'call-{id(self)}-{self._calls}')

    def _past(self, offset: int, timestamp: float) -> Optional[dict]:
        """The frame so many frames (< 0) ago, None if there is none."""
        if self.interval is None:
            return self._history[offset] if -offset <= len(self._history) else None
        target = timestamp + offset * self.interval
        near = [info for info in self._history
                if abs(info['timestamp'] - target) < self.interval / 2]
        return min(near, key=lambda info: abs(info['timestamp'] - target), default=None)

    def _still_needed(self, history: list[dict]) -> list[dict]:
        """What a later call may use."""
        oldest = self.frames[0]
        if oldest == 0:
            return []
        if self.interval is None:
            return history[oldest:]
        first = history[-1]['timestamp'] + (oldest - 0.5) * self.interval
        return [info for info in history if info['timestamp'] > first]
