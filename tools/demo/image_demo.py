# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Draws the predictions of a model of mmdet, mmseg or mmpretrain on images.

python tools/demo/image_demo.py image.jpg configs/<...>.py checkpoint.pth --out-dir pictures
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Optional

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.structures import PixelData

from mmdcnv4.checks.checkpoints import check_checkpoint
from mmdcnv4.checks.config import default_scope
from mmdcnv4.checks.samples import check_image
from mmdcnv4.checks.weights import check_match
from mmdcnv4.cli import arguments, checkpoints, config, preflight
from mmdcnv4.cli.explain import explain
from mmdcnv4.errors import UserError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.gif')
SMALLEST = 32  # side of a picture; the visualizers of the libraries cannot draw on one pixel
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
                        default='none', help='colours of detections; none: those of the dataset')
    arguments.add_config_arguments(parser)
    arguments.add_checkpoint_arguments(parser)
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


def why_unreadable(file: Path) -> str:
    """What is the matter with an image that OpenCV does not read: absent, corrupt, a GIF, ..."""
    try:
        check_image(str(file))
    except UserError as error:
        return str(error)
    return f'cannot read the image {file}: OpenCV reads it, mmcv does not.'


def make_detector(cfg: Config, args: argparse.Namespace) -> Draw:
    """A function that draws detections."""
    from mmdet.apis import inference_detector, init_detector
    from mmdet.registry import VISUALIZERS
    shapes = preflight.read_shapes(args.checkpoint)
    model = init_detector(cfg, args.checkpoint, palette=args.palette, device=args.device)
    check_match(model, shapes, args.checkpoint, cfg, not args.allow_mismatch, '--allow-mismatch')
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
    # mmseg looks for it there; copied, because it removes steps
    cfg.test_pipeline = deepcopy(config.innermost(cfg.test_dataloader.dataset).pipeline)
    shapes = preflight.read_shapes(args.checkpoint)
    model = init_model(cfg, args.checkpoint, device=args.device)
    check_match(model, shapes, args.checkpoint, cfg, not args.allow_mismatch, '--allow-mismatch')
    visualizer: Any = VISUALIZERS.build(cfg.visualizer)
    visualizer.dataset_meta = model.dataset_meta
    visualizer.alpha = args.opacity

    def draw(image: np.ndarray, name: str, out_file: Path) -> None:
        result = inference_model(model, image)
        factor = -(-SMALLEST // min(image.shape[:2]))
        if factor > 1:
            image = image.repeat(factor, 0).repeat(factor, 1)
            labels = result.pred_sem_seg.data
            result.set_data(dict(pred_sem_seg=PixelData(data=labels.repeat_interleave(
                factor, -1).repeat_interleave(factor, -2))))
        visualizer.add_datasample(name, mmcv.bgr2rgb(image), result, draw_gt=False,
                                  out_file=str(out_file))

    return draw


def make_classifier(cfg: Config, args: argparse.Namespace) -> Draw:
    """A function that writes the likeliest class and its probability on the image."""
    from mmpretrain.apis import ImageClassificationInferencer
    from mmpretrain.visualization import UniversalVisualizer
    shapes = preflight.read_shapes(args.checkpoint)
    classify: Any = ImageClassificationInferencer(cfg, pretrained=args.checkpoint,
                                                  device=args.device)
    check_match(classify.model, shapes, args.checkpoint, cfg, not args.allow_mismatch,
                '--allow-mismatch')
    visualizer: Any = UniversalVisualizer()

    def draw(image: np.ndarray, name: str, out_file: Path) -> None:
        (result,) = classify(image, return_datasamples=True)
        label = int(result.pred_label)
        title = classify.classes[label] if classify.classes else f'class {label}'
        print(f'{name}: {title}, {float(result.pred_score[label]):.3f}')
        factor = -(-SMALLEST // min(image.shape[:2]))
        visualizer.visualize_cls(
            mmcv.bgr2rgb(image.repeat(factor, 0).repeat(factor, 1)), result,
            classes=classify.classes, draw_gt=False, out_file=str(out_file))

    return draw


MAKERS = {'mmdet': make_detector, 'mmseg': make_segmentor, 'mmpretrain': make_classifier}


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Draws every image; one that cannot be read is named and left out."""
    args = parse_args(argv)
    with explain(debug=args.debug):
        files = find_images(Path(args.image))
        cfg = config.load_config(args)
        check_checkpoint(args.checkpoint, 'checkpoint')
        preflight.check_device(args.device)
        preflight.check_folder(args.out_dir, '--out-dir')
        scope = default_scope(cfg)
        if scope not in MAKERS:
            raise UserError(f'image_demo.py draws for default_scope {", ".join(MAKERS)}, '
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
                unreadable.append(why_unreadable(file))
                continue
            draw(image, file.name, Path(args.out_dir) / file.name)
        print(f'{len(files) - len(unreadable)} picture(s) are in {args.out_dir}')
        if unreadable:
            sys.stdout.flush()
            raise UserError('\n'.join(unreadable))


if __name__ == '__main__':
    main()
