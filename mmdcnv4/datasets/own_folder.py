# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What a folder of the user holds: where its files are, its classes, and the sizes of its objects.

Two layouts are known: COCO (boxes, with or without masks) and images with label maps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Optional

import cv2
import numpy as np

from ..errors import InvalidValue, MissingFile

SPLITS = {'train': ('train', 'training'), 'val': ('val', 'valid', 'validation'), 'test': ('test',)}
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff')


class Split(NamedTuple):
    """The files of a split, relative to the folder, with `/`."""

    annotations: str  # a COCO file or the folder of the label maps
    images: str  # the folder of the images


class CocoFolder(NamedTuple):
    """A dataset in COCO layout.

    Attributes:
        root: the folder.
        splits: train, val and, if there is one, test.
        classes: names of the categories that occur, in the order of their ids.
        has_masks: whether every object to train on has an outline.
        num_images: images to train on that have an object.
        image_size: median width and height of these, in pixels.
        small_size: of the class with the smallest objects, the median of the square root of the
            area of a box, as a part of the longer side of the image.
        aspect_ratios: height / width of these boxes.
        max_objects: most objects in one image.
    """

    root: Path
    splits: dict[str, Split]
    classes: tuple[str, ...]
    has_masks: bool
    num_images: int
    image_size: tuple[int, int]
    small_size: float
    aspect_ratios: np.ndarray
    max_objects: int


class SemanticFolder(NamedTuple):
    """Images with label maps of the same name.

    Attributes:
        root: the folder.
        splits: train, val and, if there is one, test.
        suffixes: of the images and of the label maps.
        classes: their names, label 0 first.
        ignore_index: the label of pixels without a class.
        num_images: images to train on.
        image_size: median width and height of these, in pixels.
        frequencies: of every class, pixels over the pixels of the label maps it occurs in.
    """

    root: Path
    splits: dict[str, Split]
    suffixes: tuple[str, str]
    classes: tuple[str, ...]
    ignore_index: int
    num_images: int
    image_size: tuple[int, int]
    frequencies: np.ndarray


def _median_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    width, height = np.median(sizes, axis=0)
    return int(width), int(height)


def split_of(path: Path) -> Optional[str]:
    """The split that a path names: by its last folder, or by a word of the name of the file."""
    words = path.stem.lower().replace('-', '_').split('_')
    for name, synonyms in SPLITS.items():
        if path.parent.name.lower() in synonyms:
            return name
        if any(word.rstrip('0123456789') in synonyms for word in words):
            return name
    return None


def _is_coco(file: Path) -> bool:
    try:
        content = json.loads(file.read_bytes())
    except ValueError:
        return False
    return isinstance(content, dict) and all(
        isinstance(content.get(key), list) for key in ('images', 'annotations', 'categories')) \
        and any('bbox' in annotation for annotation in content['annotations'][:1])


def _find_coco_files(root: Path) -> dict[str, Path]:
    """The annotation file of every split."""
    found: dict[str, list[Path]] = {}
    for pattern in ('*.json', 'annotations/*.json', '*/_annotations.coco.json'):
        for file in sorted(root.glob(pattern)):
            name = split_of(file)
            if name is not None and _is_coco(file):
                found.setdefault(name, []).append(file)
    for name in ('train', 'val'):
        if name not in found:
            raise MissingFile(
                f'{root} has no COCO file with boxes for the split {name}: expected for example '
                f'annotations/instances_{name}.json, {name}.json or {name}/_annotations.coco.json.')
    for name, files in found.items():
        if len(files) > 1:
            raise InvalidValue(f'{root} has several COCO files for the split {name}: '
                               f'{", ".join(map(str, files))}. Leave one of them.')
    return {name: files[0] for name, files in found.items()}


def _image_folder(root: Path, annotations: Path, split: str, name: str) -> Path:
    """The folder in which the image of that name is."""
    names = (*SPLITS[split], f'{split}2017')
    candidates = [root / 'images', root, annotations.parent,
                  *(root / 'images' / word for word in names), *(root / word for word in names)]
    for folder in candidates:
        if (folder / name).is_file():
            return folder
    raise MissingFile(f'the image {name} of {annotations} is in none of '
                      f'{", ".join(map(str, candidates))}.')


def read_coco_folder(root: Path) -> CocoFolder:
    """Reads a folder in COCO layout.

    Args:
        root: a folder with one COCO file for `train`, one for `val` and perhaps one for `test`,
            e.g. `annotations/instances_train.json` and images in `images/train`.

    Raises:
        MissingFile: there is no such file, or the images of one are not found.
        InvalidValue: several files could be meant, or no object is left to train on.
    """
    files = _find_coco_files(root)
    contents = {name: json.loads(file.read_bytes()) for name, file in files.items()}
    splits = {}
    for name, file in files.items():
        if not contents[name]['images']:
            raise InvalidValue(f'{file} lists no image.')
        folder = _image_folder(root, file, name, contents[name]['images'][0]['file_name'])
        splits[name] = Split(file.relative_to(root).as_posix(),
                             folder.relative_to(root).as_posix())
    content = contents['train']
    images = {image['id']: image for image in content['images']}
    objects = [item for item in content['annotations'] if not item.get('iscrowd')
               and item['image_id'] in images and min(item['bbox'][2:]) >= 1]
    if not objects:
        raise InvalidValue(f'{files["train"]} has no object to train on: none with a box of at '
                           'least one pixel that is not a crowd.')
    used = {item['category_id'] for item in objects}
    categories = sorted((category for category in content['categories'] if category['id'] in used),
                        key=lambda category: category['id'])
    boxes = np.array([item['bbox'][2:] for item in objects], dtype=float)
    sides = np.array([max(images[item['image_id']][side] for side in ('width', 'height'))
                      for item in objects])
    relative = np.sqrt(boxes.prod(axis=1)) / sides
    labels = np.array([item['category_id'] for item in objects])
    _, counts = np.unique([item['image_id'] for item in objects], return_counts=True)
    sizes = [(image['width'], image['height']) for image in images.values()]
    return CocoFolder(
        root, splits, tuple(category['name'] for category in categories),
        all(item.get('segmentation') for item in objects), len(counts),
        _median_size(sizes),
        min(float(np.median(relative[labels == category['id']])) for category in categories),
        boxes[:, 1] / boxes[:, 0], int(counts.max()))


# ------------------------------------------------------------------------------ label maps


def _find_semantic_folders(root: Path) -> dict[str, Split]:
    splits = {}
    for name, words in SPLITS.items():
        pairs = [(f'{kind}/{word}', f'images/{word}') for word in words
                 for kind in ('annotations', 'labels', 'masks')]
        pairs += [(f'{word}/{kind}', f'{word}/images') for word in words
                  for kind in ('annotations', 'labels', 'masks')]
        found = [Split(*pair) for pair in pairs if all((root / path).is_dir() for path in pair)]
        if found:
            splits[name] = found[0]
        elif name != 'test':
            raise MissingFile(f'{root} has no images with label maps for the split {name}: '
                              f'expected images/{name} and annotations/{name}.')
    return splits


def _suffix(folder: Path, allowed: Sequence[str]) -> str:
    found = sorted({file.suffix for file in folder.iterdir() if file.suffix.lower() in allowed})
    if len(found) != 1:
        raise InvalidValue(f'{folder} must hold files of one of the types {", ".join(allowed)}, '
                           f'got {", ".join(found) or "none"}.')
    return found[0]


def _read_label_maps(folder: Path, suffix: str) -> Iterator[tuple[Path, np.ndarray]]:
    for file in sorted(folder.glob(f'*{suffix}')):
        labels = cv2.imread(str(file), cv2.IMREAD_UNCHANGED)
        if labels is None or labels.ndim != 2 or labels.dtype != np.uint8:
            shape = 'nothing' if labels is None else f'{labels.shape}, {labels.dtype}'
            raise InvalidValue(f'the label map {file} must be an image of shape (H, W) of uint8, '
                               f'one label per pixel, got {shape}.')
        yield file, labels


def _class_names(root: Path, names: Optional[Sequence[str]], used: Sequence[int]
                 ) -> tuple[str, ...]:
    """Of the argument, of `classes.txt`, or made from the labels."""
    if names is None and (root / 'classes.txt').is_file():
        names = (root / 'classes.txt').read_text().split('\n')
        names = [name.strip() for name in names if name.strip()]
    if names is None:
        names = [f'class {label}' for label in range(max(used) + 1)]
    if max(used) >= len(names):
        raise InvalidValue(f'the label maps of {root} have the labels {", ".join(map(str, used))}, '
                           f'and there are names for {len(names)} classes: {", ".join(names)}. If '
                           'the last one stands for pixels without a class, give it as '
                           'ignore_index (--ignore-index of quick_start.py).')
    return tuple(names)


def read_semantic_folder(root: Path, classes: Optional[Sequence[str]] = None,
                         ignore_index: int = 255) -> SemanticFolder:
    """Reads a folder of images and label maps.

    Args:
        root: has `images/{train,val,test}` and `annotations/{train,val,test}`; label maps are
            gray images of uint8 that have the names of their images.
        classes: names, label 0 first; None takes the lines of `root/classes.txt`, and without
            that file 'class 0', 'class 1' and so on.
        ignore_index: the label of pixels without a class.

    Raises:
        MissingFile: a folder is missing, or the image of a label map.
        InvalidValue: a file is not a label map, or a label has no class.
    """
    splits = _find_semantic_folders(root)
    train = splits['train']
    suffixes = (_suffix(root / train.images, IMAGE_SUFFIXES),
                _suffix(root / train.annotations, ('.png', '.bmp', '.tif')))
    pixels, occurs, sizes = np.zeros(256, int), np.zeros(256, int), []
    for file, labels in _read_label_maps(root / train.annotations, suffixes[1]):
        image = root / train.images / (file.stem + suffixes[0])
        if not image.is_file():
            raise MissingFile(f'the label map {file} has no image {image}.')
        counts = np.bincount(labels.ravel(), minlength=256)
        counts[ignore_index] = 0
        pixels += counts
        occurs += (counts > 0) * counts.sum()
        sizes.append((labels.shape[1], labels.shape[0]))
    used = np.flatnonzero(pixels).tolist()
    if not used:
        raise InvalidValue(f'the label maps of {root / train.annotations} have no label but '
                           f'{ignore_index}, that of pixels without a class.')
    names = _class_names(root, classes, used)
    frequencies = pixels[:len(names)] / np.maximum(occurs[:len(names)], 1)
    return SemanticFolder(root, splits, suffixes, names, ignore_index, len(sizes),
                          _median_size(sizes), frequencies)
