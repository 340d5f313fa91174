# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Pipeline of the multi-camera, multi-frame detector.

Images are a flat list, frame by frame and camera by camera. Box and matrix conventions are those
of mmdetection3d 1.x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Optional

import mmcv
import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet3d.datasets.transforms import Pack3DDetInputs
from mmdet3d.registry import TRANSFORMS
from mmengine.fileio import get
from mmengine.structures import InstanceData

from ...errors import InvalidValue, MissingFile, MissingKey
from ..geometry import bda_matrix, current2frame

CAMERAS = ('CAM_FRONT', 'CAM_FRONT_RIGHT', 'CAM_FRONT_LEFT', 'CAM_BACK', 'CAM_BACK_LEFT',
           'CAM_BACK_RIGHT')


def _homogeneous(matrix: Any) -> np.ndarray:
    """A 3x3 or 4x4 matrix as 4x4, float64."""
    matrix = np.asarray(matrix, dtype=np.float64)
    out = np.eye(4)
    out[:matrix.shape[0], :matrix.shape[1]] = matrix
    return out


@TRANSFORMS.register_module()
class LoadTemporalMultiViewImages(BaseTransform):
    """Loads the images of all frames; every matrix starts in the current LiDAR frame.

    An image is read from the file `img_path`, or is the array `img` of its entry.

    Adds `img` (list of T * V images), `frame_valid` (T,), `frame_tokens` (those of the frames that
    are there, by index), `cam2img` (T, V, 4, 4) and `lidar2cam`
    (T, V, 4, 4), float64, with the ego motion in it. A missing frame repeats the current one and
    is marked in `frame_valid`.

    Args:
        cameras: names, in the order that the model learns.
        backend_args: of mmengine's file client.

    Raises:
        KeyError: an info lacks a camera.
        FileNotFoundError: an image is missing; the message names camera and sample.
    """

    def __init__(self, cameras: Sequence[str] = CAMERAS,
                 backend_args: Optional[dict] = None) -> None:
        self.cameras = tuple(cameras)
        self.backend_args = backend_args

    def _load(self, info: dict, camera: str) -> np.ndarray:
        if camera not in info['images']:
            raise MissingKey(f'LoadTemporalMultiViewImages: sample {info["token"]} must have '
                             f'camera {camera}, got {sorted(info["images"])}')
        if 'img' in info['images'][camera]:  # a stream of images has no files
            return info['images'][camera]['img']
        path = info['images'][camera].get('img_path')
        try:
            data = get(path, backend_args=self.backend_args)
        except (OSError, TypeError) as error:
            raise MissingFile(
                f'LoadTemporalMultiViewImages: no image of {camera} of sample {info["token"]} at '
                f'{path}; check data_root and data_prefix') from error
        # OpenCV gives None for a damaged image, and an error of its own for an empty file
        image = mmcv.imfrombytes(data, flag='color', channel_order='bgr') if data else None
        if image is None:
            raise InvalidValue(f'LoadTemporalMultiViewImages: the image of {camera} of sample '
                               f'{info["token"]} at {path} cannot be decoded; it is damaged')
        return image

    def transform(self, results: dict) -> dict:
        """Loads; see the class."""
        infos = results['frame_infos']
        current = infos[results['frames'].index(0)]
        lidar2ego = results['lidar_points']['lidar2ego']
        images, intrinsics, extrinsics = [], [], []
        loaded: dict[str, list[np.ndarray]] = {}
        for info in infos:
            info = current if info is None else info
            if info['token'] in loaded:  # a transform may write into an image
                images += [image.copy() for image in loaded[info['token']]]
            else:
                loaded[info['token']] = [self._load(info, camera) for camera in self.cameras]
                images += loaded[info['token']]
            motion = current2frame(lidar2ego, current['ego2global'], info['ego2global'])
            views = [info['images'][camera] for camera in self.cameras]
            intrinsics.append([_homogeneous(view['cam2img']) for view in views])
            extrinsics.append([_homogeneous(view['lidar2cam']) @ motion for view in views])
        results['img'] = images
        results['ori_shape'] = results['img_shape'] = images[0].shape[:2]
        results['frame_tokens'] = {
            index: info['token'] for index, info in enumerate(infos) if info is not None}
        results['frame_valid'] = np.array([info is not None for info in infos])
        results['cam2img'] = np.array(intrinsics)
        results['lidar2cam'] = np.array(extrinsics)
        results['cameras'] = self.cameras
        return results


@TRANSFORMS.register_module()
class BEVAugment(BaseTransform):
    """Rotates, scales and flips the boxes on the ground plane; the model moves its features alike.

    Adds `bda_mat`, float32 (3, 3). Images and perspective targets stay as they are.

    Args:
        rotation: largest angle in radians, either way.
        scale: smallest and largest factor.
        flip_x_prob: probability of x -> -x.
        flip_y_prob: probability of y -> -y.
    """

    def __init__(self, rotation: float = float(np.deg2rad(22.5)),
                 scale: Sequence[float] = (0.95, 1.05), flip_x_prob: float = 0.5,
                 flip_y_prob: float = 0.5) -> None:
        self.rotation, self.scale = rotation, tuple(scale)
        self.flip_x_prob, self.flip_y_prob = flip_x_prob, flip_y_prob

    def transform(self, results: dict) -> dict:
        """Draws once per sample."""
        angle = np.random.uniform(-self.rotation, self.rotation)
        scale = np.random.uniform(self.scale[0], self.scale[1])
        flip_x = bool(np.random.rand() < self.flip_x_prob)
        flip_y = bool(np.random.rand() < self.flip_y_prob)
        boxes = results['gt_bboxes_3d']
        boxes.rotate(angle)
        boxes.scale(scale)
        if flip_x:
            boxes.flip('vertical')
        if flip_y:
            boxes.flip('horizontal')
        results['bda_mat'] = bda_matrix(angle, scale, flip_x, flip_y)
        return results


@TRANSFORMS.register_module()
class MultiViewCropResize(BaseTransform):
    """Crops and resizes all images alike, and the intrinsics with them.

    Adds `image_transform` (3, 3), from raw to network pixels, and `img_flip`: whether the model
    shall mirror the images (it mirrors the feature maps back, so that no geometry changes).

    Args:
        crop: x1, y1, x2, y2 in pixels.
        heights: heights to choose from, in pixels; the width follows.
        img_flip_prob: probability of `img_flip`.

    Raises:
        ValueError: the crop is not four numbers, or not inside the image; a height is no positive
            integer.
    """

    def __init__(self, crop: Sequence[int] = (0, 260, 1600, 900), heights: Sequence[int] = (640,),
                 img_flip_prob: float = 0.0) -> None:
        if not isinstance(crop, (list, tuple)) or len(crop) != 4:
            raise InvalidValue('MultiViewCropResize: crop must be four numbers x1, y1, x2, y2, '
                               f'got {crop!r}')
        if not isinstance(heights, (list, tuple)) or not heights or not all(
                isinstance(height, int) and height > 0 for height in heights):
            raise InvalidValue('MultiViewCropResize: heights must be a list of integers > 0, got '
                               f'{heights!r}')
        self.crop, self.heights = tuple(crop), tuple(heights)
        self.img_flip_prob = img_flip_prob

    def transform(self, results: dict) -> dict:
        """Draws one height and one flip per sample, for all cameras and frames."""
        x1, y1, x2, y2 = self.crop
        for image in results['img']:
            if not (0 <= x1 < x2 <= image.shape[1] and 0 <= y1 < y2 <= image.shape[0]):
                raise InvalidValue(f'MultiViewCropResize: crop must be inside the image '
                                   f'{image.shape[1]} x {image.shape[0]}, got {self.crop}')
        height = int(np.random.choice(self.heights))
        width = round((x2 - x1) * height / (y2 - y1))
        views = [image[y1:y2, x1:x2] for image in results['img']]
        results['img'] = [np.ascontiguousarray(view) if view.shape[:2] == (height, width)
                          else mmcv.imresize(view, (width, height)) for view in views]
        results['img_shape'] = (height, width)
        scale_x, scale_y = width / (x2 - x1), height / (y2 - y1)
        transform = np.array([[scale_x, 0, -scale_x * x1], [0, scale_y, -scale_y * y1], [0, 0, 1]])
        results['image_transform'] = transform
        results['cam2img'] = _homogeneous(transform) @ results['cam2img']
        results['img_flip'] = bool(np.random.rand() < self.img_flip_prob)
        return results


@TRANSFORMS.register_module()
class ClipToUint8(BaseTransform):
    """Images to bytes, clipped: a plain cast would turn 260 into 4. Bytes stay as they are."""

    def transform(self, results: dict) -> dict:
        """Rounds and clips the images of `img` that are no bytes yet."""
        results['img'] = [
            image if image.dtype == np.uint8 else np.clip(np.rint(image), 0, 255).astype(np.uint8)
            for image in results['img']]
        return results


@TRANSFORMS.register_module()
class PackBEVInputs(Pack3DDetInputs):
    """Packs images, boxes, perspective targets and geometry.

    `inputs['img']` is (T * V, 3, h, w), uint8. The sample has `gt_instances_3d` and, where there
    are perspective targets, `gt_mono` (all cameras in one, so that it moves to the device). Its
    metainfo holds `lidar2img` (T, V, 4, 4), `cam2img` and `lidar2cam` (V, 4, 4, current frame),
    `frame_valid` (T,), `frames`, `img_flip`, `bda_mat` (3, 3), float32.
    """

    _META_KEYS = ('sample_idx', 'token', 'box_type_3d', 'box_mode_3d', 'img_shape', 'ori_shape',
                  'frame_valid', 'frames', 'img_flip', 'bda_mat', 'lidar2img', 'cam2img',
                  'lidar2cam', 'cameras', 'image_transform', 'classes',
                  'frame_tokens')

    def __init__(self, keys: Sequence[str] = ('img', 'gt_bboxes_3d', 'gt_labels_3d')) -> None:
        super().__init__(tuple(keys), self._META_KEYS)

    def pack_single_results(self, results: dict) -> dict:
        """Packs one sample; see the class."""
        results = dict(results)
        current = results['frames'].index(0)
        lidar2img = results['cam2img'] @ results['lidar2cam']
        results.update(lidar2img=lidar2img.astype(np.float32),
                       cam2img=results['cam2img'][current].astype(np.float32),
                       lidar2cam=results['lidar2cam'][current].astype(np.float32))
        results.setdefault('bda_mat', np.eye(3, dtype=np.float32))
        results.setdefault('img_flip', False)
        packed = super().pack_single_results(results)
        if 'gt_mono' in results:
            packed['data_samples'].gt_mono = InstanceData(**{
                key: torch.from_numpy(value) for key, value in results['gt_mono'].items()})
        return packed
