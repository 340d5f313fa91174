# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Draws a data set, trains a small FlashInternImage Mask R-CNN on it, tests it, shows pictures.

python tools/demo/quick_start.py        (or: make demo)

The steps are those of any other project: `tools/dataset_converters/drawn_scenes.py`,
`tools/train.py`, `tools/test.py`.
"""

import argparse
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import mmcv
import numpy as np
from matplotlib.patches import Rectangle
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mmdcnv4.datasets.drawn_scenes import CLASSES, PALETTE, write_drawn_scenes

REPOSITORY = Path(__file__).resolve().parents[2]
CONFIG = (REPOSITORY / 'configs/quick_start'
          / 'mask-rcnn_flash-intern-image-mini_fpn_1xb2-6e_drawn-scenes-160x160.py')
METRICS = {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}
SCORE_THRESHOLD = 0.5  # of the predictions that are drawn


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='From nothing to a trained detector in minutes.')
    parser.add_argument('--config', type=Path, default=CONFIG)
    parser.add_argument('--data', type=Path, default=Path('data/drawn_scenes'),
                        help='where the data set is, or is drawn')
    parser.add_argument('--work-dir', type=Path, default=Path('work_dirs/quick_start'))
    parser.add_argument('--num-train', type=int, default=800, help='training images to draw')
    parser.add_argument('--num-val', type=int, default=100, help='held-out images to draw')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='handed on to tools/train.py and tools/test.py')
    return parser.parse_args(argv)


def run_tool(name: str, *arguments: str) -> None:
    """Runs a program of `tools/` as a user would; ends this one where that fails."""
    command = [sys.executable, str(REPOSITORY / 'tools' / name), *arguments]
    # Half of the cores: this model is too small to gain from more threads (on two cores two are
    # hardly faster than one), and threads that wait for each other lose several times that as soon
    # as another program wants a core. And no warnings of other packages.
    environment = {'OMP_NUM_THREADS': str(max(1, (os.cpu_count() or 1) // 2)),
                   'PYTHONWARNINGS': 'ignore::UserWarning', **os.environ}
    code = subprocess.run(command, check=False, env=environment).returncode
    if code != 0:
        raise SystemExit(code)


def newest(folder: Path, pattern: str, since: float) -> Path:
    """The file of that name pattern that was written last, not before `since` (epoch seconds)."""
    files = [file for file in folder.glob(pattern) if file.stat().st_mtime >= since]
    if not files:
        raise SystemExit(f'error: the run left no {pattern} in {folder}')
    return max(files, key=lambda file: file.stat().st_mtime)


# -------------------------------------------------------------------------------------- pictures


def read_curves(scalars: Path) -> tuple[np.ndarray, dict[str, list[tuple[int, float]]]]:
    """Losses and metrics of a run from the scalars that MMEngine logs.

    Returns:
        (iteration, loss) rows, shape (points, 2), and for each metric its (iteration, value)
        points.
    """
    losses: list[tuple[int, float]] = []
    metrics: dict[str, list[tuple[int, float]]] = {name: [] for name in METRICS}
    iteration = 0
    for line in scalars.read_text().splitlines():
        record = json.loads(line)
        if 'loss' in record:
            iteration = record['step']
            losses.append((iteration, record['loss']))
        for name, points in metrics.items():
            if name in record:
                points.append((iteration, record[name]))
    return np.array(losses), metrics


def plot_curves(scalars: Path, out_file: Path) -> None:
    """Loss on the left, AP on the held-out split on the right, over iterations."""
    losses, metrics = read_curves(scalars)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout='constrained')
    left.plot(losses[:, 0], losses[:, 1], color='tab:blue')
    left.set(xlabel='iteration', ylabel='loss', title='Training loss')
    left.set_ylim(0, 1.05 * losses[:, 1].max())
    for (name, points), color, shift in zip(metrics.items(), ('tab:green', 'tab:orange'),
                                            (8, -16)):
        if not points:
            continue
        right.plot(*zip(*points), marker='o', color=color, label=METRICS[name])
        right.annotate(f'{points[-1][1]:.3f}', points[-1], xytext=(0, shift), ha='right',
                       textcoords='offset points', color=color)
    right.set(xlabel='iteration', ylabel='AP, IoU 0.50 to 0.95', ylim=(0, 1),
              title='Average precision on the held-out split')
    right.legend(loc='lower right')
    for axes in (left, right):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    figure.savefig(out_file, dpi=120)
    plt.close(figure)


def place_label(box: Sequence[float], text: str, size: int,
                taken: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Where the lower left corner of a label goes: above its box, or the next free line below.

    Args:
        box: x, y, w, h.
        text: the label; a letter is about 5 pixels wide, a line 9 high.
        size: side of the image.
        taken: (left, right, bottom) of the labels placed so far; the new one is added.
    """
    left = min(max(box[0], 1), size - 5 * len(text))
    right, bottom = left + 5 * len(text), max(box[1] - 2, 9)
    while any(left < end and right > start and abs(bottom - line) < 9
              for start, end, line in taken):
        bottom += 3
    taken.append((left, right, bottom))
    return left, bottom


def draw_panel(axes: Any, image: np.ndarray, objects: Sequence[dict], title: str) -> None:
    """An image with masks, boxes and labels.

    Args:
        axes: where to draw.
        image: shape (H, W, 3), uint8, RGB.
        objects: each with label (int), bbox (x, y, w, h), mask (H, W) and, if predicted, score.
        title: above the image.
    """
    height, width = image.shape[:2]
    shown = image.astype(float)
    taken: list[tuple[float, float, float]] = []
    for item in objects:
        shown[item['mask']] = 0.6 * shown[item['mask']] + 0.4 * np.array(PALETTE[item['label']])
    axes.imshow(shown.astype(np.uint8), interpolation='nearest')
    for item in objects:
        x, y, w, h = item['bbox']
        color = np.array(PALETTE[item['label']]) / 255
        axes.contour(item['mask'], [0.5], colors=[color], linewidths=2.0)
        axes.add_patch(Rectangle((x - 0.5, y - 0.5), w, h, fill=False, edgecolor=color,
                                 linewidth=1.0, linestyle='--'))
        text = CLASSES[item['label']]
        if 'score' in item:
            text += f' {item["score"]:.2f}'
        axes.text(*place_label(item['bbox'], text, width, taken), text, fontsize=8.5,
                  color='white', va='bottom',
                  bbox=dict(facecolor=0.75 * color, edgecolor='none', pad=1.0))
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)


def read_predictions(file: Path) -> dict[str, list[dict]]:
    """What `tools/test.py --out` wrote: for each image name the objects above the threshold."""
    with open(file, 'rb') as stream:
        results = pickle.load(stream)
    predictions: dict[str, list[dict]] = {}
    for result in results:
        found = result['pred_instances']
        boxes = np.asarray(found['bboxes'], dtype=float)
        predictions[Path(result['img_path']).name] = [
            dict(label=int(label), score=float(score), mask=coco_mask.decode(mask).astype(bool),
                 bbox=(box[0], box[1], box[2] - box[0], box[3] - box[1]))
            for box, label, score, mask in zip(boxes, found['labels'], found['scores'],
                                               found['masks'])
            if score >= SCORE_THRESHOLD]
    return predictions


def draw_contact_sheet(data: Path, predictions: dict[str, list[dict]], out_file: Path,
                       rows: int = 4, pairs: int = 2) -> None:
    """The first images of the held-out split: annotation and, beside it, prediction."""
    coco = COCO(str(data / 'coco/annotations/instances_val.json'))
    records = coco.loadImgs(sorted(coco.getImgIds())[:rows * pairs])
    rows = -(-len(records) // pairs)
    figure, grid = plt.subplots(rows, 2 * pairs, figsize=(5.6 * pairs, 3.0 * rows), squeeze=False,
                                layout='constrained')
    for axes in grid.flat:
        axes.set_axis_off()
    for index, record in enumerate(records):
        left, right = grid[index // pairs, 2 * (index % pairs):][:2]
        image = mmcv.imread(str(data / 'coco/images/val' / record['file_name']),
                            channel_order='rgb')
        truth = [dict(label=item['category_id'] - 1, bbox=item['bbox'],
                      mask=coco.annToMask(item).astype(bool))
                 for item in coco.loadAnns(coco.getAnnIds(imgIds=record['id']))]
        for axes, objects, title in ((left, truth, 'annotation'),
                                     (right, predictions[record['file_name']], 'prediction')):
            axes.set_axis_on()
            draw_panel(axes, image, objects, f'{record["file_name"]}: {title}')
    figure.savefig(out_file, dpi=110)
    plt.close(figure)


# ------------------------------------------------------------------------------------------ main


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Draws, trains, tests, shows."""
    args = parse_args(argv)
    start = time.time()
    if not args.data.exists():
        print(f'Drawing {args.num_train} + {args.num_val} scenes into {args.data}', flush=True)
        write_drawn_scenes(args.data, args.num_train, args.num_val)
    options = [f'{loader}_dataloader.dataset.data_root={args.data}/coco/'
               for loader in ('train', 'val', 'test')]
    options += [f'{loader}_evaluator.ann_file={args.data}/coco/annotations/instances_val.json'
                for loader in ('val', 'test')]
    common = ['--work-dir', str(args.work_dir), '--cfg-options', *options, *args.cfg_options]

    train_start = time.time()
    run_tool('train.py', str(args.config), *common)
    test_start = time.time()
    checkpoint = (args.work_dir / 'last_checkpoint').read_text().strip()
    results = args.work_dir / 'predictions.pkl'
    run_tool('test.py', str(args.config), checkpoint, '--out', str(results), *common)
    end = time.time()

    metrics = json.loads(newest(args.work_dir, '*/*.json', test_start).read_text())
    plot_curves(newest(args.work_dir, '*/vis_data/scalars.json', train_start),
                args.work_dir / 'curves.png')
    draw_contact_sheet(args.data, read_predictions(results), args.work_dir / 'predictions.png')
    print('\nOn the held-out split: '
          + ', '.join(f'{label} {metrics[name]:.3f}' for name, label in METRICS.items()))
    print(f'Seconds: training {test_start - train_start:.0f}, test {end - test_start:.0f}, '
          f'all {time.time() - start:.0f}')
    print(f'Pictures: {args.work_dir / "curves.png"}, {args.work_dir / "predictions.png"}')
    print(f'Model: {checkpoint}')


if __name__ == '__main__':
    main()
