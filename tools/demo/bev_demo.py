# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Draws 3-D boxes in all camera images and from above, truth beside prediction.

One sample as a picture, or a whole scene as a video:

python tools/demo/bev_demo.py configs/bevformer_v2/<...>.py checkpoint.pth --out picture.png
python tools/demo/bev_demo.py configs/bevformer_v2/<...>.py checkpoint.pth --scene 0 --out s.mp4
python tools/demo/bev_demo.py configs/bevformer_v2/<...>.py --results out.pkl --scene 0 --out s.mp4

Predictions come from a checkpoint, or from a file: that of `tools/test.py --out`, or the JSON file
of nuScenes. In the images the truth is white and predictions have the colour of their class.
Without predictions the truth alone is drawn.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import cv2
import mmcv
import numpy as np
import torch
from mmengine.config import Config

from mmdcnv4.checks.checkpoints import check_checkpoint
from mmdcnv4.checks.config import default_scope
from mmdcnv4.checks.weights import check_match
from mmdcnv4.cli import arguments, checkpoints, config, preflight, video
from mmdcnv4.cli.explain import explain
from mmdcnv4.errors import UserError

PICTURES, VIDEOS = ('.png', '.jpg', '.jpeg'), ('.mp4', )
SHOWN = 20  # scenes in a message


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Draw boxes in camera images and from above.')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file')
    parser.add_argument('--results', metavar='FILE', help='predictions of tools/test.py --out '
                        '(.pkl) or in the format of nuScenes (.json), instead of a checkpoint')
    which = parser.add_mutually_exclusive_group()
    which.add_argument('--index', type=int, default=0, help='sample of the test set')
    which.add_argument('--scene', help='token or number of a scene: all its samples, as a video')
    parser.add_argument('--fps', type=float, default=2.0, help='pictures per second of the video')
    parser.add_argument('--data-root', help='folder of the dataset, instead of that of the config')
    parser.add_argument('--ann-file', help='info file, instead of that of the config')
    parser.add_argument('--out', help='the picture (.png, .jpg), or with --scene the video (.mp4)')
    parser.add_argument('--score-thr', type=float, default=0.3,
                        help='draw predictions above this score')
    parser.add_argument('--range', type=float, default=50.0, help='half side of the view, metres')
    parser.add_argument('--device', default='cuda:0' if torch.cuda.is_available() else 'cpu',
                        help='cpu, cuda:0, ...')
    arguments.add_config_arguments(parser)
    arguments.add_checkpoint_arguments(parser)
    args = parser.parse_args(argv)
    for name in ('fps', 'range'):
        if not getattr(args, name) > 0:
            parser.error(f'--{name} must be > 0, got {getattr(args, name)}')
    if args.checkpoint is not None and args.results is not None:
        parser.error('give a checkpoint or --results, not both')
    args.out = args.out or ('outputs/bev.png' if args.scene is None else 'outputs/bev.mp4')
    args.work_dir, args.launcher, args.local_rank = str(Path(args.out).parent), 'none', 0
    return args


def build_dataset(cfg: Config, args: argparse.Namespace) -> Any:
    """The test set; its images lie in `samples/<camera>`, or directly in `--data-root`."""
    from mmdet3d.registry import DATASETS
    if cfg.get('test_dataloader') is None:
        raise UserError(f'the config {args.config} has no test_dataloader to read samples from.')
    options = cfg.test_dataloader.dataset
    if args.data_root is not None:
        options.data_root = args.data_root
        if not (Path(args.data_root) / 'samples').is_dir():
            options.data_prefix = {key: '' for key in options.data_prefix}
    if args.ann_file is not None:
        options.ann_file = str(Path(args.ann_file).absolute())
    return DATASETS.build(options)


def choose_samples(dataset: Any, args: argparse.Namespace) -> list[int]:
    """Indices of the samples to draw, in the order of time.

    Raises:
        UserError: no such sample or scene; the message lists the scenes.
    """
    if args.scene is None:
        if not 0 <= args.index < len(dataset):
            raise UserError(f'--index must be 0 ... {len(dataset) - 1}, got {args.index}.')
        return [args.index]
    scenes = dataset.scenes()
    if args.scene in scenes:
        return scenes[args.scene]
    if args.scene.isdigit() and int(args.scene) < len(scenes):
        return list(scenes.values())[int(args.scene)]
    shown = [f'{number}: {token} ({len(samples)} samples)'
             for number, (token, samples) in enumerate(scenes.items())][:SHOWN]
    more = f'\n... and {len(scenes) - SHOWN} more' if len(scenes) > SHOWN else ''
    raise UserError(f'--scene must be the token or the number of one of {len(scenes)} scenes, got '
                    f'{args.scene}:\n' + '\n'.join(shown) + more)


def build_model(cfg: Config, args: argparse.Namespace) -> Any:
    """The detector with its weights, ready to predict."""
    from mmdet3d.registry import MODELS
    from mmengine.model import revert_sync_batchnorm
    from mmengine.runner import load_checkpoint
    checkpoints.allow_mmengine_checkpoints()
    cfg.model.cache_maps = True
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    check_match(model, preflight.read_shapes(args.checkpoint), args.checkpoint, cfg,
                not args.allow_mismatch, '--allow-mismatch')
    load_checkpoint(model, args.checkpoint, map_location='cpu')
    return model.to(args.device).eval()


Predict = Callable[[int, dict, dict], Any]  # index, info, BGR images by camera -> Found


def predict_with_model(cfg: Config, args: argparse.Namespace, dataset: Any) -> Predict:
    """Predictions of a checkpoint: call by call, or of a model that looks ahead, of the dataset."""
    from mmdcnv4.bevformer_v2.inferencer import BEVInferencer, Calibration
    from mmdcnv4.bevformer_v2.results import Found
    model = build_model(cfg, args)

    def found_by(sample: Any) -> Found:
        found = sample.pred_instances_3d.to('cpu')
        return Found(found.bboxes_3d, found.scores_3d, found.labels_3d)

    if args.scene is None or model.frames[-1] > 0:
        from mmengine.dataset import pseudo_collate

        @torch.no_grad()
        def predict(index: int, info: dict, images: dict) -> Found:
            return found_by(model.test_step(pseudo_collate([dataset[index]]))[0])
        return predict
    inferencer = BEVInferencer(model, cfg.test_dataloader.dataset.pipeline,
                               dataset.metainfo['classes'], interval=None, max_gap=math.inf)
    return lambda index, info, images: found_by(inferencer.infer(
        images, Calibration.from_info(info), info['ego2global'], info['timestamp']))


def predict_from_file(path: str, dataset: Any) -> Predict:
    """Predictions of a file."""
    from mmdcnv4.bevformer_v2.results import found_in, read_results
    results = read_results(path)
    return lambda index, info, images: found_in(results, info, dataset.metainfo['classes'])


def true_boxes(info: dict) -> Any:
    """Boxes of the info file with a LiDAR or radar point, those of unknown class left out."""
    from mmdet3d.structures import LiDARInstance3DBoxes

    from mmdcnv4.bevformer_v2.drawing import Layer
    items = [item for item in info.get('instances', ())
             if item['num_lidar_pts'] + item['num_radar_pts'] > 0
             and info['label_mapping'][item['bbox_label_3d']] >= 0]
    rows = [[*item['bbox_3d'], *item['velocity']] for item in items]
    tensor = torch.tensor(rows, dtype=torch.float32).reshape(-1, 9)
    return Layer(LiDARInstance3DBoxes(tensor, box_dim=9, origin=(0.5, 0.5, 0.5)),
                 [info['label_mapping'][item['bbox_label_3d']] for item in items])


def read_points(info: dict, data_root: str) -> Optional[np.ndarray]:
    """The LiDAR sweep (n, 5), None where its file is absent."""
    lidar = info['lidar_points']
    for folder in ('samples/LIDAR_TOP', '') if lidar.get('lidar_path') else ():
        path = Path(data_root, folder, lidar['lidar_path'])
        if path.is_file():
            return np.fromfile(path, np.float32).reshape(-1, lidar['num_pts_feats'])
    return None


def read_image(path: str, camera: str, token: str) -> np.ndarray:
    """An image, BGR.

    Raises:
        UserError: there is none; the message names camera and sample.
    """
    image = cv2.imread(path)
    if image is None:
        raise UserError(f'no image of {camera} of sample {token} can be read from {path}; check '
                        '--data-root')
    return image


def pictures(dataset: Any, samples: Sequence[int], predict: Optional[Predict],
             args: argparse.Namespace) -> Iterator[np.ndarray]:
    """One RGB picture per sample."""
    from mmdcnv4.bevformer_v2.drawing import Layer, draw_sample
    for number, index in enumerate(samples):
        info = dataset.get_data_info(index)
        images = {camera: read_image(view['img_path'], camera, info['token'])
                  for camera, view in info['images'].items()}
        layer, title = None, f'sample {info["token"]}'
        if predict is not None:
            found = predict(index, info, images)
            keep = found.scores > args.score_thr
            layer = Layer(found.boxes[keep], found.labels[keep].tolist())
            title += f', predictions above {args.score_thr:g}'
        if args.scene is not None:
            title += f', {number + 1} of {len(samples)}'
        yield draw_sample({camera: cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
                           for camera, image in images.items()}, info['images'], true_boxes(info),
                          layer, dataset.metainfo['classes'], title, args.range,
                          read_points(info, dataset.data_root))


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Draws one sample, or one scene."""
    args = parse_args(argv)
    with explain(debug=args.debug):
        preflight.check_device(args.device)
        preflight.check_file(args.out, '--out', PICTURES if args.scene is None else VIDEOS)
        cfg = config.load_config(args)
        cfg.load_from = args.checkpoint
        check_checkpoint(args.checkpoint, 'checkpoint')
        scope = default_scope(cfg)
        if scope != 'mmdet3d':
            raise UserError(f'bev_demo.py draws for default_scope mmdet3d, got {scope}.')
    with explain(cfg, args.debug):
        from mmdet3d.utils import register_all_modules
        register_all_modules()
        dataset = build_dataset(cfg, args)
        samples = choose_samples(dataset, args)
        predict: Optional[Predict] = None
        if args.checkpoint is not None:
            predict = predict_with_model(cfg, args, dataset)
        elif args.results is not None:
            predict = predict_from_file(args.results, dataset)
        drawn = pictures(dataset, samples, predict, args)
        if args.scene is None:
            mmcv.imwrite(cv2.cvtColor(next(drawn), cv2.COLOR_RGB2BGR), args.out)
            print(f'the picture is {args.out}')
        else:
            count = video.write_video(args.out, drawn, args.fps)
            print(f'the video is {args.out}: {count} pictures, {count / args.fps:g} s')


if __name__ == '__main__':
    main()
