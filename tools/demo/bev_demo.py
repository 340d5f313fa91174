# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Draws 3-D boxes in all camera images and from above, truth and prediction, as one picture.

python tools/demo/bev_demo.py configs/bevformer_v2/<...>.py checkpoint.pth --out picture.png

Truth is drawn in white, predictions in the colour of their class. Without a checkpoint only the
truth is drawn.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import matplotlib

matplotlib.use('Agg')
import cv2
import matplotlib.pyplot as plt
import mmcv
import numpy as np
import torch
from mmengine.config import Config

from mmdcnv4.checks.config import default_scope
from mmdcnv4.cli import arguments, checkpoints, config, preflight
from mmdcnv4.cli.explain import explain
from mmdcnv4.errors import UserError

# pairs of corners in mmdet3d's order: bottom, top, uprights
EDGES = ((0, 3), (3, 7), (7, 4), (4, 0), (1, 2), (2, 6), (6, 5), (5, 1), (0, 1), (3, 2), (7, 6),
         (4, 5))
WHITE = (255, 255, 255)
NEAR = 0.2  # metres; what is nearer to the camera is cut off
# left to right as the scene lies around the car
ROWS = (('CAM_FRONT_LEFT', 'CAM_FRONT', 'CAM_FRONT_RIGHT'),
        ('CAM_BACK_RIGHT', 'CAM_BACK', 'CAM_BACK_LEFT'))


def parse_args(argv: Optional[Sequence[str]] = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description='Draw boxes in camera images and from above.')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file; without it only truth')
    parser.add_argument('--index', type=int, default=0, help='sample of the test set')
    parser.add_argument('--data-root', help='folder of the data set, instead of that of the config')
    parser.add_argument('--ann-file', help='info file, instead of that of the config')
    parser.add_argument('--out', default='outputs/bev.png', help='the picture')
    parser.add_argument('--score-thr', type=float, default=0.3,
                        help='draw predictions above this score')
    parser.add_argument('--range', type=float, default=50.0, help='half side of the view, metres')
    parser.add_argument('--device', default='cuda:0' if torch.cuda.is_available() else 'cpu',
                        help='cpu, cuda:0, ...')
    arguments.add_config_arguments(parser)
    args = parser.parse_args(argv)
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
    dataset = DATASETS.build(options)
    if not 0 <= args.index < len(dataset):
        raise UserError(f'--index must be 0 ... {len(dataset) - 1}, got {args.index}.')
    return dataset


def build_model(cfg: Config, args: argparse.Namespace) -> Any:
    """The detector with its weights, ready to predict."""
    from mmdet3d.registry import MODELS
    from mmengine.model import revert_sync_batchnorm
    from mmengine.runner import load_checkpoint
    checkpoints.allow_mmengine_checkpoints()
    model = revert_sync_batchnorm(MODELS.build(cfg.model))
    preflight.check_weights(model, preflight.read_shapes(args.checkpoint), args.checkpoint)
    load_checkpoint(model, args.checkpoint, map_location='cpu')
    return model.to(args.device).eval()


def true_boxes(info: dict) -> Any:
    """Boxes of the info file with a LiDAR or radar point, those of unknown class left out."""
    from mmdet3d.structures import LiDARInstance3DBoxes
    rows = [[*item['bbox_3d'], *item['velocity']] for item in info.get('instances', ())
            if item['num_lidar_pts'] + item['num_radar_pts'] > 0
            and info['label_mapping'][item['bbox_label_3d']] >= 0]
    tensor = torch.tensor(rows, dtype=torch.float32).reshape(-1, 9)
    return LiDARInstance3DBoxes(tensor, box_dim=9, origin=(0.5, 0.5, 0.5))


def predicted_boxes(model: Any, sample: dict, score_thr: float) -> tuple[Any, np.ndarray]:
    """Boxes above a score, and their labels."""
    from mmengine.dataset import pseudo_collate
    with torch.no_grad():
        result = model.test_step(pseudo_collate([sample]))[0].pred_instances_3d.to('cpu')
    keep = result.scores_3d > score_thr
    return result.bboxes_3d[keep], result.labels_3d[keep].numpy()


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


def camera_pictures(info: dict, layers: Sequence[tuple[Any, Any]]) -> dict[str, np.ndarray]:
    """RGB pictures by camera; `layers` holds boxes and one colour per box."""
    pictures = {}
    for camera, view in info['images'].items():
        image = mmcv.imread(view['img_path'], channel_order='rgb')
        for boxes, colours in layers:
            for corners, colour in zip(boxes.corners.numpy(), colours):
                draw_edges(image, corners, np.asarray(view['lidar2cam']),
                           np.asarray(view['cam2img']), colour)
        pictures[camera] = image
    return pictures


def draw_plane(axes: Any, layers: Sequence[tuple[Any, Any]], points: Optional[np.ndarray],
               limit: float) -> None:
    """The view from above: y, ahead, points up. A line shows where a box faces."""
    axes.set_facecolor('black')
    if points is not None:
        axes.scatter(points[:, 0], points[:, 1], s=0.2, c='gray', linewidths=0)
    for boxes, colours in layers:
        for box, colour in zip(boxes.tensor.numpy(), colours):
            x, y, _, length, width, _, yaw = box[:7]
            forward = np.array([np.cos(yaw), np.sin(yaw)]) * length / 2
            left = np.array([-np.sin(yaw), np.cos(yaw)]) * width / 2
            ring = np.array([forward + left, forward - left, -forward - left, left - forward,
                             forward + left]) + [x, y]
            shade = np.array(colour) / 255
            axes.plot(ring[:, 0], ring[:, 1], color=shade, linewidth=1)
            axes.plot([x, x + forward[0]], [y, y + forward[1]], color=shade, linewidth=1)
    axes.plot(0, 0, marker='^', color='red')
    axes.yaxis.tick_right()  # away from the images
    axes.yaxis.set_label_position('right')
    axes.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect='equal', xlabel='x (m)',
             ylabel='y (m)')


def read_points(info: dict, data_root: str) -> Optional[np.ndarray]:
    """The LiDAR sweep (n, 5), None where its file is absent."""
    lidar = info['lidar_points']
    for folder in ('samples/LIDAR_TOP', ''):
        path = Path(data_root, folder, lidar['lidar_path'])
        if path.is_file():
            return np.fromfile(path, np.float32).reshape(-1, lidar['num_pts_feats'])
    return None


def draw(info: dict, data_root: str, layers: Sequence[tuple[Any, Any]], args: argparse.Namespace,
         title: str) -> None:
    """Writes the picture."""
    pictures = camera_pictures(info, layers)
    figure = plt.figure(figsize=(20, 6.4))
    grid = figure.add_gridspec(2, 4, width_ratios=(1, 1, 1, 1.15), wspace=0.03, hspace=0.06,
                               left=0.01, right=0.96, bottom=0.08, top=0.92)
    for row, cameras in enumerate(ROWS):
        for column, camera in enumerate(cameras):
            axes = figure.add_subplot(grid[row, column])
            axes.axis('off')
            axes.set_title(camera, fontsize=8, pad=2)
            if camera in pictures:
                axes.imshow(pictures[camera])
    draw_plane(figure.add_subplot(grid[:, 3]), layers, read_points(info, data_root), args.range)
    figure.suptitle(title, fontsize=10)
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=110)
    plt.close(figure)


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Draws one sample."""
    args = parse_args(argv)
    with explain(debug=args.debug):
        preflight.check_device(args.device)
        preflight.check_file(args.out, '--out', preflight.PICTURE_ENDINGS)
        cfg = config.load_config(args)
        cfg.load_from = args.checkpoint
        preflight.check_checkpoint(args.checkpoint, 'checkpoint')
        scope = default_scope(cfg)
        if scope != 'mmdet3d':
            raise UserError(f'bev_demo.py draws for default_scope mmdet3d, got {scope}.')
    with explain(cfg, args.debug):
        from mmdet3d.utils import register_all_modules
        register_all_modules()
        dataset = build_dataset(cfg, args)
        info = dataset.get_data_info(args.index)
        truth = true_boxes(info)
        layers = [(truth, [WHITE] * len(truth))]
        title = f'sample {info["token"]}: {len(truth)} objects (white)'
        if args.checkpoint is not None:
            boxes, labels = predicted_boxes(build_model(cfg, args), dataset[args.index],
                                            args.score_thr)
            palette = (plt.get_cmap('tab10').colors * 10)[:len(dataset.metainfo['classes'])]
            layers.append((boxes, [tuple(int(255 * x) for x in palette[label])
                                   for label in labels]))
            title += f', {len(boxes)} predictions above {args.score_thr} (coloured by class)'
        draw(info, cfg.test_dataloader.dataset.data_root, layers, args, title)
    print(f'the picture is {args.out}')


if __name__ == '__main__':
    main()
