# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Draws the predictions of a detector or segmentor (mmdet, mmseg) on images.

python tools/demo/image_demo.py image.jpg configs/<...>.py checkpoint.pth --out-dir pictures
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Optional

import mmcv
import numpy as np
import torch
from mmengine.config import Config

from mmdcnv4.checks.config import default_scope
from mmdcnv4.cli import arguments, checkpoints, config, preflight
from mmdcnv4.cli.explain import explain
from mmdcnv4.errors import UserError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp')
Draw = Callable[[np.ndarray, str, Path], None]


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Draw predictions on images.')
    parser.add_argument('image', help='image file, or folder of images')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out-dir', default='outputs', help='folder for the pictures')
    parser.add_argument('--score-thr', type=float, default=0.3,
                        help='draw detections above this score')
    parser.add_argument('--opacity', type=float, default=0.5, help='of segmentation maps, 0 to 1')
    parser.add_argument('--device', default='cuda:0' if torch.cuda.is_available() else 'cpu',
                        help='cpu, cuda:0, ...')
    parser.add_argument('--palette', choices=['none', 'coco', 'voc', 'citys', 'random'],
                        default='none', help='colours of detections; none: those of the data set')
    arguments.add_config_arguments(parser)
    args = parser.parse_args(argv)
    args.work_dir, args.launcher, args.local_rank = args.out_dir, 'none', 0
    return args


def find_images(path: Path) -> list[Path]:
    """The image itself, or the images in a folder.

    Raises:
        UserError: there is none.
    """
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f'the folder {path} holds no images ({", ".join(SUFFIXES)}).')
        return files
    if not path.is_file():
        raise UserError(f'the image {path} does not exist.')
    return [path]


def make_detector(cfg: Config, args: argparse.Namespace) -> Draw:
    """A function that draws detections."""
    from mmdet.apis import inference_detector, init_detector
    from mmdet.registry import VISUALIZERS
    shapes = preflight.read_shapes(args.checkpoint)
    model = init_detector(cfg, args.checkpoint, palette=args.palette, device=args.device)
    preflight.check_weights(model, shapes, args.checkpoint)
    visualizer: Any = VISUALIZERS.build(cfg.visualizer)
    visualizer.dataset_meta = model.dataset_meta

    def draw(image: np.ndarray, name: str, out_file: Path) -> None:
        visualizer.add_datasample(name, mmcv.bgr2rgb(image), inference_detector(model, image),
                                  draw_gt=False, pred_score_thr=args.score_thr,
                                  out_file=str(out_file))

    return draw


def make_segmentor(cfg: Config, args: argparse.Namespace) -> Draw:
    """A function that draws segmentation maps."""
    from mmseg.apis import inference_model, init_model
    from mmseg.registry import VISUALIZERS
    if 'test_pipeline' not in cfg:  # where mmseg looks for it
        cfg.test_pipeline = cfg.test_dataloader.dataset.pipeline
    shapes = preflight.read_shapes(args.checkpoint)
    model = init_model(cfg, args.checkpoint, device=args.device)
    preflight.check_weights(model, shapes, args.checkpoint)
    visualizer: Any = VISUALIZERS.build(cfg.visualizer)
    visualizer.dataset_meta = model.dataset_meta
    visualizer.alpha = args.opacity

    def draw(image: np.ndarray, name: str, out_file: Path) -> None:
        visualizer.add_datasample(name, mmcv.bgr2rgb(image), inference_model(model, image),
                                  draw_gt=False, out_file=str(out_file))

    return draw


MAKERS = {'mmdet': make_detector, 'mmseg': make_segmentor}


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Draws every image; one that cannot be read is named and left out."""
    args = parse_args(argv)
    with explain(debug=args.debug):
        files = find_images(Path(args.image))
        cfg = config.load_config(args)
        preflight.check_checkpoint(args.checkpoint, 'checkpoint')
        preflight.check_device(args.device)
        preflight.check_folder(args.out_dir, '--out-dir')
        scope = default_scope(cfg)
        if scope not in MAKERS:
            raise UserError(f'image_demo.py draws for default_scope {" or ".join(MAKERS)}, '
                            f'got {scope}.')
    cfg.load_from = args.checkpoint
    cfg.visualizer.setdefault('name', 'image_demo')  # as the Runner gives it one
    with explain(cfg, args.debug):
        checkpoints.allow_mmengine_checkpoints()
        draw = MAKERS[scope](cfg, args)
        unreadable = []
        for file in files:
            image = mmcv.imread(str(file))
            if image is None:
                unreadable.append(file)
                continue
            draw(image, file.name, Path(args.out_dir) / file.name)
        print(f'{len(files) - len(unreadable)} picture(s) are in {args.out_dir}')
        if unreadable:
            sys.stdout.flush()
            raise UserError('cannot read ' + ', '.join(map(str, unreadable))
                            + ': empty or corrupt.')


if __name__ == '__main__':
    main()
