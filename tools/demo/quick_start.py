# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""From nothing to a trained model with pictures, in minutes on two CPU cores.

python tools/demo/quick_start.py                   drawn scenes, nothing is needed (make demo)
python tools/demo/quick_start.py --coco DIR        your own small dataset in COCO layout
python tools/demo/quick_start.py --semantic DIR    your own images with label maps

The steps are those of any other project: a config, `tools/train.py`, `tools/test.py`. For a folder
of your own the config is written into the work directory, with sizes derived from the data.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from mmengine.config import Config

from mmdcnv4.cli import pictures
from mmdcnv4.cli.explain import explain
from mmdcnv4.datasets import own_configs
from mmdcnv4.datasets.drawn_scenes import CLASSES, PALETTE, write_drawn_scenes
from mmdcnv4.datasets.own_folder import (
    CocoFolder,
    SemanticFolder,
    read_coco_folder,
    read_semantic_folder,
)
from mmdcnv4.errors import UserError

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
MASKS = 'quick_start/mask-rcnn_flash-intern-image-mini_fpn_1xb2-6e_drawn-scenes-160x160.py'
BOXES = 'real_images/retinanet_flash-intern-image-mini_fpn_1xb4-36e_bccd-320x240.py'
SEMANTIC = 'real_images/upernet_flash-intern-image-mini_1xb4-4k_camvid-360x480.py'
BOX_METRICS = {'coco/bbox_mAP': 'box AP', 'coco/bbox_mAP_50': 'box AP50'}
MASK_METRICS = {'coco/bbox_mAP': 'box AP', 'coco/segm_mAP': 'mask AP'}


class Task(NamedTuple):
    """What one run of this program trains and shows."""

    config: Path
    options: list[str]  # KEY=VALUE, for both tools
    metrics: dict[str, str]  # logged name -> shown name
    split: str  # that the last test is on


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='From nothing to a trained model in minutes.')
    source = parser.add_mutually_exclusive_group()
    source.add_argument('--coco', type=Path, metavar='DIR', help='a dataset in COCO layout: '
                        'annotations/{train,val}.json and the images')
    source.add_argument('--semantic', type=Path, metavar='DIR', help='images with label maps: '
                        'images/{train,val} and annotations/{train,val}')
    source.add_argument('--data', type=Path, default=Path('data/drawn_scenes'),
                        help='where the drawn scenes are, or are drawn')
    parser.add_argument('--classes', nargs='+', metavar='NAME',
                        help='with --semantic: the names of the labels 0, 1, ...')
    parser.add_argument('--ignore-index', type=int, default=255, metavar='LABEL',
                        help='with --semantic: the label of pixels without a class')
    parser.add_argument('--iterations', type=int, help='training steps for a folder of your own, '
                        'about; default 1900 with --coco, 3000 with --semantic')
    parser.add_argument('--config', type=Path, default=CONFIGS / MASKS,
                        help='for the drawn scenes')
    parser.add_argument('--work-dir', type=Path,
                        help='default: work_dirs/quick_start, or work_dirs/<name of DIR>')
    parser.add_argument('--num-train', type=int, default=800, help='training images to draw')
    parser.add_argument('--num-val', type=int, default=100, help='held-out images to draw')
    parser.add_argument('--cfg-options', nargs='+', default=[], metavar='KEY=VALUE',
                        help='handed on to tools/train.py and tools/test.py')
    args = parser.parse_args(argv)
    if args.semantic is None and (args.classes or args.ignore_index != 255):
        parser.error('--classes and --ignore-index belong to --semantic')
    if args.iterations is not None and args.iterations < 1:
        parser.error(f'--iterations must be at least 1, got {args.iterations}')
    if args.work_dir is None:
        own = args.coco or args.semantic
        args.work_dir = Path('work_dirs') / (own.resolve().name if own else 'quick_start')
    return args


def run_tool(name: str, *arguments: str) -> None:
    """Runs a program of `tools/` as a user would; ends this one where that fails."""
    command = [sys.executable, str(CONFIGS.parent / 'tools' / name), *arguments]
    # Half of the cores: these models are too small to gain from more threads (on two cores two are
    # hardly faster than one), and threads that wait for each other lose several times that as soon
    # as another program wants a core. And no warnings of other packages.
    environment = dict(os.environ)
    for name, value in (('OMP_NUM_THREADS', str(max(1, (os.cpu_count() or 1) // 2))),
                        ('PYTHONWARNINGS', 'ignore::UserWarning')):
        environment[name] = environment.get(name) or value
    code = subprocess.run(command, check=False, env=environment).returncode
    if code != 0:
        raise SystemExit(code)


def written_config(args: argparse.Namespace, base: str, entries: dict[str, Any]) -> Path:
    """Writes the config of a run into its work directory.

    Args:
        args: the command line.
        base: the config of this package that it inherits.
        entries: what differs from it.
    """
    args.work_dir.mkdir(parents=True, exist_ok=True)
    file = args.work_dir / f'{args.work_dir.name}.py'
    text = Config(dict(_base_=str(CONFIGS / base), **entries)).pretty_text
    file.write_text('# Written by tools/demo/quick_start.py, with sizes derived from the data.\n'
                    '# Change what you like, then run tools/train.py with this file.\n' + text)
    print(f'Config: {file}', flush=True)
    return file


def drawn_task(args: argparse.Namespace) -> Task:
    """The drawn scenes, which are drawn where they are missing."""
    if not args.data.exists():
        print(f'Drawing {args.num_train} + {args.num_val} scenes into {args.data}', flush=True)
        write_drawn_scenes(args.data, args.num_train, args.num_val)
    options = [f'{loader}_dataloader.dataset.data_root={args.data}/coco/'
               for loader in ('train', 'val', 'test')]
    options += [f'{loader}_evaluator.ann_file={args.data}/coco/annotations/instances_val.json'
                for loader in ('val', 'test')]
    return Task(args.config, options, MASK_METRICS, 'val')


def coco_task(args: argparse.Namespace, folder: CocoFolder) -> Task:
    """A detector for a folder of the user: Mask R-CNN if all objects have outlines."""
    base = MASKS if folder.has_masks else BOXES
    entries = own_configs.detector_entries(folder, Config.fromfile(CONFIGS / base),
                                           args.iterations or 1900)
    side = own_configs.detector_side(folder)
    print(f'{folder.num_images} images to train on, {len(folder.classes)} classes: '
          f'{", ".join(folder.classes)}. {"Boxes and masks" if folder.has_masks else "Boxes"}; '
          f'images resized to {side} pixels on the longer side; '
          f'{entries["train_cfg"]["max_epochs"]} epochs.')
    metrics = MASK_METRICS if folder.has_masks else BOX_METRICS
    split = 'test' if 'test' in folder.splits else 'val'
    return Task(written_config(args, base, entries), [], metrics, split)


def semantic_task(args: argparse.Namespace, folder: SemanticFolder) -> Task:
    """A UperNet for a folder of the user."""
    entries = own_configs.segmentor_entries(folder, Config.fromfile(CONFIGS / SEMANTIC),
                                            args.iterations or 3000)
    print(f'{folder.num_images} images to train on, {len(folder.classes)} classes: '
          f'{", ".join(folder.classes)}; label {folder.ignore_index} is ignored; crops of '
          f'{entries["crop_size"][0]} x {entries["crop_size"][1]} pixels.')
    split = 'test' if 'test' in folder.splits else 'val'
    options = [f'test_evaluator.output_dir={args.work_dir}/predictions']
    return Task(written_config(args, SEMANTIC, entries), options, {'mIoU': 'mIoU'}, split)


def draw_curves(args: argparse.Namespace, task: Task, since: float) -> None:
    """Loss and metrics over iterations, by `tools/analysis_tools/plot_curves.py`."""
    scalars = pictures.newest(args.work_dir, '*/vis_data/scalars.json', since)
    if scalars is None:
        raise UserError(f'the run left no curves in {args.work_dir}')
    # a detector that found nothing at all has no AP
    logged = [name for name in task.metrics if f'"{name}":' in scalars.read_text()]
    run_tool('analysis_tools/plot_curves.py', str(args.work_dir), '--panel', 'loss',
             *(['--panel', *logged] if logged else []), '--out', str(args.work_dir / 'curves.png'))


def draw_sheet(args: argparse.Namespace, folder: Any, task: Task) -> None:
    """The first images of the split that was tested, annotation next to prediction."""
    out_file = args.work_dir / 'predictions.png'
    if isinstance(folder, SemanticFolder):
        split = folder.splits[task.split]
        files = sorted((folder.root / split.images).glob('*' + folder.suffixes[0]))
        picked = files[::max(1, len(files) // 8)][:8]
        classes = pictures.Classes(folder.classes, own_configs.palette(len(folder.classes)))
        pictures.draw_segmentation_sheet(picked, folder.root / split.annotations,
                                         args.work_dir / 'predictions', classes,
                                         folder.ignore_index, out_file, folder.suffixes[1])
        return
    if folder is None:
        annotations = args.data / 'coco/annotations/instances_val.json'
        images, classes = args.data / 'coco/images/val', pictures.Classes(CLASSES, PALETTE)
    else:
        split = folder.splits[task.split]
        annotations, images = folder.root / split.annotations, folder.root / split.images
        classes = pictures.Classes(folder.classes, own_configs.palette(len(folder.classes)))
    pictures.draw_detection_sheet(
        annotations, images, pictures.read_predictions(args.work_dir / 'predictions.pkl'), classes,
        out_file)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Reads or draws the data, trains, tests, shows."""
    args = parse_args(argv)
    start = time.time()
    folder: Any = None
    if args.coco is not None:
        folder = read_coco_folder(args.coco)
        task = coco_task(args, folder)
    elif args.semantic is not None:
        folder = read_semantic_folder(args.semantic, args.classes, args.ignore_index)
        task = semantic_task(args, folder)
    else:
        task = drawn_task(args)
    options = [*task.options, *args.cfg_options]
    common = ['--work-dir', str(args.work_dir), *(['--cfg-options', *options] if options else [])]

    train_start = time.time()
    run_tool('train.py', str(task.config), *common)
    test_start = time.time()
    draw_curves(args, task, train_start)
    checkpoint = (args.work_dir / 'last_checkpoint').read_text().strip()
    out = [] if args.semantic else ['--out', str(args.work_dir / 'predictions.pkl')]
    run_tool('test.py', str(task.config), checkpoint, *out, *common)
    end = time.time()

    scores = pictures.newest(args.work_dir, '*/*.json', test_start)
    if scores is None:
        raise UserError(f'the run left no scores in {args.work_dir}')
    metrics = json.loads(scores.read_text())
    draw_sheet(args, folder, task)
    where = 'held-out split' if folder is None else f'{task.split} split'
    print(f'\nOn the {where}: '
          + ', '.join(f'{label} {metrics[name]:.3f}' if name in metrics else f'no {label}'
                      for name, label in task.metrics.items()))
    print(f'Seconds: training {test_start - train_start:.0f}, test {end - test_start:.0f}, '
          f'all {time.time() - start:.0f}')
    print(f'Pictures: {args.work_dir / "curves.png"}, {args.work_dir / "predictions.png"}')
    print(f'Model: {checkpoint}')


if __name__ == '__main__':
    with explain():
        main()
