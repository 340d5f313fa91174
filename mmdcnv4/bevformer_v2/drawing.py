# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of boxes: in the images of all cameras, and from above, truth beside prediction.

All pictures are RGB, uint8, shape (H, W, 3).
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Optional

import cv2
import numpy as np

# pairs of corners in mmdet3d's order: bottom, top, uprights
EDGES = ((0, 3), (3, 7), (7, 4), (4, 0), (1, 2), (2, 6), (6, 5), (5, 1), (0, 1), (3, 2), (7, 6),
         (4, 5))
# left to right as the scene lies around the car
ROWS = (('CAM_FRONT_LEFT', 'CAM_FRONT', 'CAM_FRONT_RIGHT'),
        ('CAM_BACK_RIGHT', 'CAM_BACK', 'CAM_BACK_LEFT'))
TABLEAU = ((31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189),
           (140, 86, 75), (227, 119, 194), (188, 189, 34), (23, 190, 207), (174, 199, 232))
WHITE, GRAY, DARK, BLACK = (255, 255, 255), (130, 130, 130), (45, 45, 45), (0, 0, 0)
NEAR = 0.2  # metres; what is nearer to the camera is cut off
_CELL = 480  # pixels; width of a camera
_BAR = 34  # pixels; height of a line of text
_RING = 10.0  # metres between circles
_FONT = cv2.FONT_HERSHEY_SIMPLEX


class Layer(NamedTuple):
    """Boxes of one sample with their labels; `boxes` is a `LiDARInstance3DBoxes`."""

    boxes: Any
    labels: Sequence[int]


def class_colours(count: int) -> list[tuple[int, int, int]]:
    """One colour per class; ten that are easy to tell apart, of more a circle of hues."""
    if count <= len(TABLEAU):
        return list(TABLEAU[:count])
    hues = [colorsys.hsv_to_rgb(index / count, 0.75, 0.95) for index in range(count)]
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in hues]


def draw_edges(image: np.ndarray, corners: np.ndarray, lidar2cam: np.ndarray,
               cam2img: np.ndarray, colour: Sequence[int]) -> None:
    """Draws the visible parts of the edges of one box; `corners` is (8, 3), LiDAR frame."""
    camera = corners @ lidar2cam[:3, :3].T + lidar2cam[:3, 3]
    if (camera[:, 2] < NEAR).all():
        return
    for start, end in EDGES:
        a, b = camera[start], camera[end]
        if a[2] < b[2]:
            a, b = b, a
        if a[2] <= NEAR:
            continue
        if b[2] < NEAR:
            b = a + (a[2] - NEAR) / (a[2] - b[2]) * (b - a)
        pixels = np.stack([a, b]) @ cam2img[:3, :3].T
        pixels = np.clip(pixels[:, :2] / pixels[:, 2:], -1e5, 1e5).round().astype(int)
        is_seen, first, second = cv2.clipLine((0, 0, image.shape[1], image.shape[0]),
                                              *(tuple(map(int, pixel)) for pixel in pixels))
        if is_seen:
            cv2.line(image, first, second, tuple(map(int, colour)),
                     max(1, image.shape[1] // 500), cv2.LINE_AA)


def _text(picture: np.ndarray, words: str, place: tuple[int, int],
          colour: tuple[int, int, int] = WHITE, size: float = 0.5) -> None:
    cv2.putText(picture, words, place, _FONT, size, colour, 1, cv2.LINE_AA)


def draw_camera(image: np.ndarray, view: Mapping[str, Any],
                layers: Sequence[tuple[Layer, Sequence[Sequence[int]]]]) -> np.ndarray:
    """A copy of an image with boxes.

    Args:
        image: shape (H, W, 3).
        view: `lidar2cam` (4, 4) and `cam2img` (3, 3 or 4, 4) of this image.
        layers: boxes with one colour per box, drawn one over the other.
    """
    out = image.copy()
    for layer, colours in layers:
        for corners, colour in zip(layer.boxes.corners.numpy(), colours):
            draw_edges(out, corners, np.asarray(view['lidar2cam']), np.asarray(view['cam2img']),
                       colour)
    return out


def draw_plane(layer: Layer, colours: Sequence[Sequence[int]], size: int, limit: float,
               title: str, points: Optional[np.ndarray] = None) -> np.ndarray:
    """The view from above: x to the right, y, ahead in nuScenes, up. A line shows the front.

    Args:
        layer: boxes in the LiDAR frame.
        colours: one per box.
        size: side of the picture in pixels.
        limit: half side of the view in metres.
        title: in a corner.
        points: LiDAR points, shape (n, 2 or more), metres.
    """
    picture = np.zeros((size, size, 3), np.uint8)
    scale = size / (2 * limit)

    def pixel(place: np.ndarray) -> tuple[int, int]:
        return round(size / 2 + scale * place[0]), round(size / 2 - scale * place[1])

    for number in range(1, int(limit / _RING) + 1):
        cv2.circle(picture, (size // 2, size // 2), round(number * _RING * scale), DARK, 1,
                   cv2.LINE_AA)
        _text(picture, f'{number * _RING:g} m', pixel(np.array([0.5, number * _RING - 1])), GRAY,
              0.35)
    if points is not None:
        near = points[(np.abs(points[:, :2]) < 0.999 * limit).all(1), :2]
        columns, rows = np.round(size / 2 + scale * near * [1, -1]).astype(int).T
        picture[rows.clip(0, size - 1), columns.clip(0, size - 1)] = GRAY
    for box, colour in zip(layer.boxes.tensor.numpy(), colours):
        centre, (length, width), yaw = box[:2], box[3:5], box[6]
        forward = np.array([np.cos(yaw), np.sin(yaw)]) * length / 2
        left = np.array([-np.sin(yaw), np.cos(yaw)]) * width / 2
        ring = [centre + corner for corner in (forward + left, forward - left, -forward - left,
                                               left - forward)]
        colour = tuple(map(int, colour))
        cv2.polylines(picture, [np.array([pixel(place) for place in ring])], True, colour, 2,
                      cv2.LINE_AA)
        cv2.line(picture, pixel(centre), pixel(centre + forward), colour, 1, cv2.LINE_AA)
    x, y = size // 2, size // 2
    cv2.fillPoly(picture, [np.array([(x, y - 8), (x - 5, y + 5), (x + 5, y + 5)])], WHITE)
    cv2.rectangle(picture, (0, 0), (size - 1, size - 1), DARK, 1)
    _text(picture, title, (8, 20))
    return picture


def camera_rows(cameras: Sequence[str]) -> list[list[str]]:
    """How the images lie: as around the car for the names of nuScenes, else in two rows."""
    if set(cameras) <= {camera for row in ROWS for camera in row}:
        rows = [[camera for camera in row if camera in cameras] for row in ROWS]
        return [row for row in rows if row]
    width = len(cameras) if len(cameras) < 3 else (len(cameras) + 1) // 2
    return [list(cameras[start:start + width]) for start in range(0, len(cameras), width)]


def _cameras(images: Mapping[str, np.ndarray]) -> np.ndarray:
    """All images side by side, with their names."""
    rows = camera_rows(list(images))
    height = max(round(_CELL * image.shape[0] / image.shape[1]) for image in images.values())
    out = np.zeros((len(rows) * height, _CELL * max(map(len, rows)), 3), np.uint8)
    for row, cameras in enumerate(rows):
        for column, camera in enumerate(cameras):
            image = images[camera]
            size = (_CELL, round(_CELL * image.shape[0] / image.shape[1]))
            # from small images every pixel, from large ones means
            kind = cv2.INTER_AREA if image.shape[1] > _CELL else cv2.INTER_LINEAR
            cell = cv2.resize(image, size, interpolation=kind)
            _text(cell, camera, (7, 19), BLACK)
            _text(cell, camera, (6, 18))
            cv2.rectangle(cell, (0, 0), (size[0] - 1, size[1] - 1), BLACK, 1)
            out[row * height:row * height + size[1],
                column * _CELL:(column + 1) * _CELL] = cell
    return out


def _legend(classes: Sequence[str], colours: Sequence[Sequence[int]], width: int,
            note: str) -> np.ndarray:
    """Lines with a swatch per class."""
    places, x, line = [], 8, 0
    for name in (*classes, note):
        wide = cv2.getTextSize(name, _FONT, 0.5, 1)[0][0] + 40
        if x + wide > width and x > 8:
            x, line = 8, line + 1
        places.append((x, line * _BAR))
        x += wide
    out = np.zeros(((line + 1) * _BAR, width, 3), np.uint8)
    for (x, y), name, colour in zip(places, classes, colours):
        cv2.rectangle(out, (x, y + 10), (x + 16, y + 24), tuple(map(int, colour)), -1)
        _text(out, name, (x + 22, y + 22))
    _text(out, note, (places[-1][0], places[-1][1] + 22))
    return out


def draw_sample(images: Mapping[str, np.ndarray], views: Mapping[str, Mapping[str, Any]],
                truth: Layer, found: Optional[Layer], classes: Sequence[str], title: str,
                limit: float = 50.0, points: Optional[np.ndarray] = None) -> np.ndarray:
    """One picture of a sample: cameras, the truth from above, beside it the prediction, legend.

    In the images the truth is white and predictions have the colour of their class.

    Args:
        images: camera to its image.
        views: camera to `lidar2cam` and `cam2img`, see :func:`draw_camera`.
        truth: true boxes.
        found: predicted boxes; None leaves their plane out.
        classes: names of the labels.
        title: above everything.
        limit: half side of the view from above in metres.
        points: LiDAR points.

    Returns:
        The picture; its sides are even, as encoders of video want.
    """
    colours = class_colours(len(classes))
    layers: list[tuple[Layer, list]] = [(truth, [WHITE] * len(truth.labels))]
    if found is not None:
        layers.append((found, [colours[label] for label in found.labels]))
    cameras = _cameras({camera: draw_camera(image, views[camera], layers)
                        for camera, image in images.items()})
    size = max(cameras.shape[0], _CELL)
    block = np.zeros((size, cameras.shape[1], 3), np.uint8)
    block[:cameras.shape[0]] = cameras
    planes = [('truth', truth)] + ([] if found is None else [('prediction', found)])
    parts = [block] + [
        draw_plane(layer, [colours[label] for label in layer.labels], size, limit,
                   f'{name}: {len(layer.labels)}', points) for name, layer in planes]
    body = np.concatenate(parts, 1)
    head = np.zeros((_BAR, body.shape[1], 3), np.uint8)
    _text(head, title, (8, 22))
    picture = np.concatenate([head, body, _legend(
        classes, colours, body.shape[1], 'in the images: truth white')])
    return np.pad(picture, ((0, picture.shape[0] % 2), (0, picture.shape[1] % 2), (0, 0)))
