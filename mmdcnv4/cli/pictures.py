# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Sheets of annotations next to predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

import cv2
import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch, Rectangle
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from ..safe_files import load_pickle

SCORE_THRESHOLD = 0.5  # of the predictions that are drawn


class Classes(NamedTuple):
    """Names and RGB colours of the classes, label 0 first."""

    names: Sequence[str]
    palette: Sequence[tuple[int, int, int]]


# ------------------------------------------------------------------------------------- detection


def place_label(box: Sequence[float], width: float, height: float, image_width: int,
                taken: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Where the lower left corner of a label goes: above its box, or the next free line below.

    Args:
        box: x, y, w, h.
        width: of the label, in pixels of the image.
        height: of its line, likewise.
        image_width: of the image.
        taken: (left, right, bottom) of the labels placed so far; the new one is added.
    """
    left = max(min(max(box[0], 1), image_width - width), 0)
    right, bottom = left + width, max(box[1] - 2, height)
    while any(left < end and right > start and abs(bottom - line) < height
              for start, end, line in taken):
        bottom += height / 3
    taken.append((left, right, bottom))
    return left, bottom


def _legend(classes: Classes, labels: Iterable[int]) -> list[Patch]:
    """A patch of colour with its name for each of these classes."""
    colors = {label: np.array(classes.palette[label]) / 255 for label in labels}
    return [Patch(color=tuple(color), label=classes.names[label])
            for label, color in colors.items()]


def draw_panel(axes: Any, image: np.ndarray, objects: Sequence[dict], title: str,
               classes: Classes) -> None:
    """An image with boxes and labels, and masks where there are some.

    Args:
        axes: where to draw.
        image: shape (H, W, 3), uint8, RGB.
        objects: each with label (int), bbox (x, y, w, h), mask (H, W) or None and, if predicted,
            score.
        title: above the image.
        classes: their names and colours.
    """
    height, width = image.shape[:2]
    unit = width / 32  # about one letter and a half of a label
    shown = image.astype(float)
    taken: list[tuple[float, float, float]] = []
    for item in objects:
        if item['mask'] is not None:
            color = np.array(classes.palette[item['label']])
            shown[item['mask']] = 0.6 * shown[item['mask']] + 0.4 * color
    axes.imshow(shown.astype(np.uint8), interpolation='nearest')
    crowded = len(objects) > 8  # labels would cover the objects
    for item in objects:
        x, y, w, h = item['bbox']
        color = np.array(classes.palette[item['label']]) / 255
        if item['mask'] is not None:
            axes.contour(item['mask'], [0.5], colors=[color], linewidths=2.0)
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, fill=False, edgecolor=color,
                                 linewidth=1.0 if item['mask'] is not None else 1.6,
                                 linestyle='--' if item['mask'] is not None else '-'))
        text = '' if crowded else classes.names[item['label']]
        if 'score' in item:
            text += f' {item["score"]:.2f}'
        if not crowded:
            corner = place_label(item['bbox'], unit * len(text), 1.8 * unit, width, taken)
            axes.text(*corner, text.strip(), fontsize=8.5, color='white', va='bottom',
                      bbox=dict(facecolor=0.75 * color, edgecolor='none', pad=1.0))
    if crowded:
        used = sorted({item['label'] for item in objects})
        axes.legend(handles=_legend(classes, used), loc='lower right', fontsize=7, framealpha=0.8,
                    handlelength=1.0)
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)


def read_predictions(file: Path) -> dict[str, list[dict]]:
    """What `tools/test.py --out` wrote: for each image name the objects above the threshold."""
    with open(file, 'rb') as stream:
        results = load_pickle(stream, str(file))
    predictions: dict[str, list[dict]] = {}
    for result in results:
        found = result['pred_instances']
        boxes = np.asarray(found['bboxes'], dtype=float)
        masks = found.get('masks', [None] * len(boxes))
        predictions[Path(result['img_path']).name] = [
            dict(label=int(label), score=float(score),
                 mask=None if mask is None else coco_mask.decode(mask).astype(bool),
                 bbox=(box[0], box[1], box[2] - box[0], box[3] - box[1]))
            for box, label, score, mask in zip(boxes, found['labels'], found['scores'], masks)
            if score >= SCORE_THRESHOLD]
    return predictions


def _sheet(count: int, pairs: int, ratio: float) -> tuple[Any, Iterator[tuple[Any, Any]]]:
    """A figure with `pairs` pairs of axes per row, and the pairs in reading order."""
    rows = -(-count // pairs)
    figure, grid = plt.subplots(rows, 2 * pairs, squeeze=False, layout='constrained',
                                figsize=(5.6 * pairs, (2.8 * ratio + 0.25) * rows))
    for axes in grid.flat:
        axes.set_axis_off()
    places = ((grid[index // pairs, 2 * (index % pairs)],
               grid[index // pairs, 2 * (index % pairs) + 1]) for index in range(count))
    return figure, places


def draw_detection_sheet(annotations: Path, images: Path, predictions: dict[str, list[dict]],
                         classes: Classes, out_file: Path, count: int = 8) -> None:
    """The first images of a split: annotation and, next to it, prediction.

    Args:
        annotations: its COCO file.
        images: folder of its images.
        predictions: see `read_predictions`.
        classes: names are those of the categories.
        out_file: the picture.
        count: images at most.
    """
    coco = COCO(str(annotations))
    records = coco.loadImgs(sorted(coco.getImgIds())[:count])
    labels = {category['id']: list(classes.names).index(category['name'])
              for category in coco.dataset['categories'] if category['name'] in classes.names}
    figure, places = _sheet(len(records), 2, records[0]['height'] / records[0]['width'])
    for record, pair in zip(records, places):
        image = _read_rgb(images / record['file_name'])
        truth = [dict(label=labels[item['category_id']], bbox=item['bbox'],
                      mask=coco.annToMask(item).astype(bool) if item.get('segmentation') else None)
                 for item in coco.loadAnns(coco.getAnnIds(imgIds=record['id']))
                 if item['category_id'] in labels]
        name = Path(record['file_name']).name
        for axes, objects, title in zip(pair, (truth, predictions[name]),
                                        ('annotation', 'prediction')):
            axes.set_axis_on()
            draw_panel(axes, image, objects, f'{name}: {title}', classes)
    figure.savefig(out_file, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------------------------- segmentation


def _read_rgb(file: Path) -> np.ndarray:
    image = cv2.imread(str(file), cv2.IMREAD_COLOR)
    if image is None:
        raise FileNotFoundError(f'cannot read the image {file}')
    return image[..., ::-1]


def draw_segmentation_sheet(images: Sequence[Path], annotations: Path, predictions: Path,
                            classes: Classes, ignore_index: int, out_file: Path,
                            suffix: str = '.png') -> None:
    """Images with their annotation and, next to it, their prediction as colours over the image.

    Args:
        images: their files.
        annotations: folder of the label maps.
        predictions: folder of the predicted label maps, PNG files of the images' names.
        classes: their names and colours.
        ignore_index: the label without a class; it stays without a colour.
        out_file: the picture.
        suffix: of the files of `annotations`.
    """
    first = _read_rgb(images[0])
    figure, places = _sheet(len(images), 2, first.shape[0] / first.shape[1])
    palette = np.array(classes.palette, dtype=float)
    for file, pair in zip(images, places):
        image = _read_rgb(file).astype(float)
        found = (annotations / (file.stem + suffix), predictions / (file.stem + '.png'))
        for axes, source, title in zip(pair, found, ('annotation', 'prediction')):
            labels = cv2.imread(str(source), cv2.IMREAD_UNCHANGED)
            shown, known = image.copy(), (labels != ignore_index) & (labels < len(palette))
            shown[known] = 0.35 * shown[known] + 0.65 * palette[labels[known]]
            axes.imshow(shown.astype(np.uint8))
            axes.set_title(f'{file.name}: {title}', fontsize=10)
    figure.legend(handles=_legend(classes, range(len(classes.names))), loc='outside lower center',
                  ncols=min(6, len(classes.names)), fontsize=8)
    figure.savefig(out_file, dpi=110)
    plt.close(figure)


def newest(folder: Path, pattern: str, since: float) -> Optional[Path]:
    """The file of that name pattern that was written last, not before `since` (epoch seconds)."""
    files = [file for file in folder.glob(pattern) if file.stat().st_mtime >= since]
    return max(files, key=lambda file: file.stat().st_mtime, default=None)
