# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A small dataset of drawn shapes, so that a model can be trained and scored without a download.

Five classes that differ by outline alone: colour, size, rotation, texture and order of overlap
are random and independent of the class. Objects are vivid and the background is greyish, so that
it is easy to find them and hard to name them. Every object that is drawn is annotated: one
that would be too small, or would hide too much of another, is not drawn at all. Masks are the
visible parts. The same arguments give the same scenes, pixel for pixel.

`write_drawn_scenes` writes the scenes twice, in the two layouts that OpenMMLab datasets read::

    root/coco/annotations/instances_{train,val}.json    boxes, masks as run lengths
    root/coco/images/{train,val}/000001.jpg
    root/ade/images/{training,validation}/000001.jpg    the same files
    root/ade/annotations/{training,validation}/000001.png

A label map holds 0 for the background ("other") and i + 1 for `CLASSES[i]`. As in ADE20K,
`reduce_zero_label=True` ignores the background and gives the classes the ids 0 to 4; with
`reduce_zero_label=False` the background is class 0 of six.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Optional, Union

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

CLASSES = ('disk', 'ring', 'square', 'triangle', 'star')
PALETTE = ((230, 70, 60), (70, 130, 240), (60, 180, 90), (240, 180, 40), (170, 90, 220))

_SPLITS = (('train', 'training'), ('val', 'validation'))
_MIN_VISIBLE_SHARE = 0.45  # of the area an object has inside the image
_MIN_VISIBLE_PIXELS = 90
_JPEG_QUALITY = 95

FloatArray = NDArray[np.float64]


class Instance(NamedTuple):
    """One object: its class index and its visible part, a boolean mask of shape (H, W)."""

    label: int
    mask: NDArray[np.bool_]


class Scene(NamedTuple):
    """An image of shape (H, W, 3), uint8, BGR, and the objects on it."""

    image: NDArray[np.uint8]
    instances: list[Instance]


@dataclass(frozen=True)
class SceneConfig:
    """What scenes look like.

    Args:
        size: side of the square images, in pixels.
        max_objects: most objects that are tried per image; there is always at least one.
        radii: smallest and largest circumradius of an object, in pixels at size 160 (scaled with
            `size`).
    """

    size: int = 160
    max_objects: int = 5
    radii: tuple[float, float] = (14.0, 45.0)

    def __post_init__(self) -> None:
        if self.size < 64:
            raise ValueError(f'SceneConfig: size must be >= 64 pixels, got {self.size}')
        if self.max_objects < 1:
            raise ValueError(f'SceneConfig: max_objects must be >= 1, got {self.max_objects}')


def _polygon(label: int) -> Optional[FloatArray]:
    """Corners on the unit circle, (number of corners, 2) in x, y; None for round shapes."""
    name = CLASSES[label]
    if name in ('disk', 'ring'):
        return None
    corners = {'square': 4, 'triangle': 3, 'star': 10}[name]
    angles = 2 * np.pi * np.arange(corners) / corners
    radius = np.where(np.arange(corners) % 2, 0.45, 1.0) if name == 'star' else np.ones(corners)
    return radius[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _polygon_distance(points: FloatArray, corners: FloatArray) -> FloatArray:
    """Signed distance of (..., 2) points to a polygon, negative inside."""
    squared = np.full(points.shape[:-1], np.inf)
    inside = np.zeros(points.shape[:-1], dtype=bool)
    for start, end in zip(corners, np.roll(corners, -1, axis=0)):
        edge, to_point = end - start, points - start
        t = np.clip(to_point @ edge / (edge @ edge), 0, 1)
        nearest = to_point - t[..., None] * edge
        squared = np.minimum(squared, np.square(nearest).sum(-1))
        crosses = (start[1] > points[..., 1]) != (end[1] > points[..., 1])
        with np.errstate(divide='ignore', invalid='ignore'):
            x_cross = start[0] + edge[0] * to_point[..., 1] / edge[1]
        inside ^= crosses & (points[..., 0] < x_cross)
    return np.where(inside, -1.0, 1.0) * np.sqrt(squared)


def _shape_distance(label: int, points: FloatArray, radius: float, angle: float) -> FloatArray:
    """Signed distance of (..., 2) points to the outline of a shape around the origin."""
    corners = _polygon(label)
    if corners is not None:
        cos, sin = np.cos(angle), np.sin(angle)
        return _polygon_distance(points, radius * corners @ np.array([[cos, sin], [-sin, cos]]))
    distance = np.hypot(points[..., 0], points[..., 1])
    if CLASSES[label] == 'ring':
        return np.abs(distance - 0.75 * radius) - 0.25 * radius
    return distance - radius


def _signed_distance(label: int, size: int, center: FloatArray, radius: float,
                     angle: float) -> FloatArray:
    """Distance in pixels of pixel centres to the outline, negative inside: (size, size).

    Infinite more than a pixel outside the square around the shape.
    """
    low = np.maximum(np.floor(center - radius).astype(int) - 1, 0)
    high = np.minimum(np.ceil(center + radius).astype(int) + 2, size)
    rows, columns = np.mgrid[low[1]:high[1], low[0]:high[0]]
    points = np.stack([columns, rows], axis=-1) - center
    distance = np.full((size, size), np.inf)
    distance[low[1]:high[1], low[0]:high[0]] = _shape_distance(label, points, radius, angle)
    return distance


def _smooth_noise(rng: np.random.Generator, size: int, cells: int) -> FloatArray:
    """Noise with about `cells` bumps along a side, values in [-1, 1]: (size, size)."""
    coarse = rng.uniform(-1, 1, (cells + 1, cells + 1))
    return np.asarray(cv2.resize(coarse, (size, size), interpolation=cv2.INTER_LINEAR), np.float64)


def _texture(rng: np.random.Generator, size: int, color: FloatArray,
             strength: float) -> FloatArray:
    """A colour with shading and, half of the time, stripes: (size, size, 3), BGR, 0 to 255."""
    shade = strength * _smooth_noise(rng, size, int(rng.integers(2, 9)))
    if rng.random() < 0.5:
        angle, period = rng.uniform(0, np.pi), rng.uniform(5, 24)
        rows, columns = np.mgrid[:size, :size]
        phase = (np.cos(angle) * columns + np.sin(angle) * rows) * 2 * np.pi / period
        shade = shade + 0.5 * strength * np.sin(phase)
    return color + shade[..., None]


def _paper_color(rng: np.random.Generator) -> FloatArray:
    """A grey, nearly: (3,), BGR, 0 to 255."""
    return rng.uniform(40, 215) + rng.uniform(-12, 12, 3)


def _paint_color(rng: np.random.Generator, others: list[FloatArray]) -> FloatArray:
    """A vivid colour that is well apart from `others`, or the best of 20 tries: (3,), BGR."""
    best, best_gap = np.zeros(3), -1.0
    for _ in range(20):
        pure = rng.permutation([0.0, rng.random(), 1.0])  # any hue
        color = 255 * rng.uniform(0.6, 1.0) * (1 - rng.uniform(0.6, 1.0) * (1 - pure))
        gap = min(float(np.abs(color - other).max()) for other in others)
        if gap > best_gap:
            best, best_gap = color, gap
        if gap > 80:
            break
    return best


class _Canvas:
    """An image that objects are put on, one over the other.

    Args:
        rng: source of everything random.
        config: sizes.
    """

    def __init__(self, rng: np.random.Generator, config: SceneConfig) -> None:
        self.rng, self.size = rng, config.size
        self.scale = config.size / 160
        self.log_radii = np.log(np.array(config.radii) * self.scale)
        self.colors = [_paper_color(rng)]
        self.pixels = _texture(rng, self.size, self.colors[0], strength=rng.uniform(5, 30))
        self.instances: list[Instance] = []
        self.areas: list[int] = []  # of the objects before others covered them

    def _is_visible(self, mask: NDArray[np.bool_], area: int) -> bool:
        return int(mask.sum()) >= max(_MIN_VISIBLE_PIXELS * self.scale ** 2,
                                      _MIN_VISIBLE_SHARE * area)

    def try_put(self, label: int) -> bool:
        """Draws an object of class `label` at a random place, unless it would hide too much."""
        rng, size = self.rng, self.size
        radius = float(np.exp(rng.uniform(*self.log_radii)))
        center = rng.uniform(0.6 * radius, size - 0.6 * radius, 2)
        distance = _signed_distance(label, size, center, radius, rng.uniform(0, 2 * np.pi))
        mask = distance < 0
        masks = [*(instance.mask & ~mask for instance in self.instances), mask]
        areas = [*self.areas, int(mask.sum())]
        if not all(map(self._is_visible, masks, areas)):
            return False
        color = _paint_color(rng, self.colors)
        coverage = np.clip(0.5 - distance, 0, 1)[..., None]  # of each pixel, for smooth edges
        fill = _texture(rng, size, color, strength=rng.uniform(5, 30))
        self.pixels += coverage * (fill - self.pixels)
        labels = [*(instance.label for instance in self.instances), label]
        self.instances = list(map(Instance, labels, masks))
        self.areas = areas
        self.colors.append(color)
        return True

    def finish(self) -> Scene:
        """Adds sensor noise and rounds."""
        noise = self.rng.normal(0, self.rng.uniform(2, 9), self.pixels.shape)
        image = np.clip(np.rint(self.pixels + noise), 0, 255).astype(np.uint8)
        return Scene(image, self.instances)


def draw_scene(rng: np.random.Generator, labels: Iterator[int], config: SceneConfig) -> Scene:
    """Draws one image.

    Args:
        rng: source of everything random but the classes.
        labels: where the classes are taken from, one for each object that is tried.
        config: sizes.
    """
    canvas = _Canvas(rng, config)
    for _ in range(int(rng.integers(1, config.max_objects + 1))):
        label = next(labels)
        any(canvas.try_put(label) for _ in range(30))
    return canvas.finish()


def shuffled_labels(rng: np.random.Generator) -> Iterator[int]:
    """Class indices without end; each run of `len(CLASSES)` holds every class once."""
    while True:
        yield from rng.permutation(len(CLASSES)).tolist()


def _annotation(instance: Instance, image_id: int, annotation_id: int) -> dict:
    rle = coco_mask.encode(np.asfortranarray(instance.mask, dtype=np.uint8))
    return dict(id=annotation_id, image_id=image_id, category_id=instance.label + 1, iscrowd=0,
                area=int(coco_mask.area(rle)), bbox=coco_mask.toBbox(rle).tolist(),
                segmentation=dict(size=list(instance.mask.shape),
                                  counts=rle['counts'].decode('ascii')))


def _label_map(scene: Scene) -> NDArray[np.uint8]:
    labels = np.zeros(scene.image.shape[:2], dtype=np.uint8)
    for instance in scene.instances:
        labels[instance.mask] = instance.label + 1
    return labels


def _write_image(path: Path, image: NDArray[np.uint8], *options: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), image, list(options)):
        raise OSError(f'cannot write {path}')


def _write_split(root: Path, split: int, count: int, seed: int, config: SceneConfig) -> None:
    coco_split, ade_split = _SPLITS[split]
    rng = np.random.default_rng([seed, split])
    labels = shuffled_labels(rng)
    images: list[dict] = []
    annotations: list[dict] = []
    for image_id in range(1, count + 1):
        scene = draw_scene(rng, labels, config)
        name = f'{image_id:06d}'
        coco_path = root / 'coco' / 'images' / coco_split / f'{name}.jpg'
        ade_path = root / 'ade' / 'images' / ade_split / f'{name}.jpg'
        _write_image(coco_path, scene.image, cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY)
        ade_path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(coco_path, ade_path)
        _write_image(root / 'ade' / 'annotations' / ade_split / f'{name}.png', _label_map(scene))
        images.append(dict(id=image_id, file_name=f'{name}.jpg', width=config.size,
                           height=config.size))
        for instance in scene.instances:
            annotations.append(_annotation(instance, image_id, len(annotations) + 1))
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES, start=1)]
    path = root / 'coco' / 'annotations' / f'instances_{coco_split}.json'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(images=images, annotations=annotations,
                                    categories=categories)))


def write_drawn_scenes(root: Union[str, Path], num_train: int = 800, num_val: int = 100,
                       seed: int = 0, config: Optional[SceneConfig] = None) -> Path:
    """Draws both splits and writes them in COCO and ADE20K layout below `root`.

    The folder appears only when it is complete: scenes are drawn into a temporary neighbour which
    then gets the name `root`.

    Args:
        root: folder to create; it must not exist, or be empty.
        num_train, num_val: images in each split, at least 1.
        seed: another seed gives other scenes.
        config: sizes; the default is 160 x 160 pixels with 1 to 5 objects.

    Returns:
        `root` as a path.

    Raises:
        ValueError: a number is out of range.
        FileExistsError: `root` has something in it.
    """
    root = Path(root)
    if num_train < 1 or num_val < 1:
        raise ValueError('write_drawn_scenes: num_train and num_val must be >= 1, '
                         f'got {num_train} and {num_val}')
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise FileExistsError(f'write_drawn_scenes: root must not exist or be empty, got {root}')
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f'.{root.name}-') as folder:
        unfinished = Path(folder) / root.name
        for split, count in enumerate((num_train, num_val)):
            _write_split(unfinished, split, count, seed, config or SceneConfig())
        unfinished.replace(root)
    return root
