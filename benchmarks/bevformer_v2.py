# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Where the time of BEVFormer v2 goes: CPU seconds and memory per part, without data.

python benchmarks/bevformer_v2.py CONFIG [--train | --cached]

Images are noise; cameras, poses and objects are those of a made-up drive. Time is that of all
threads of the process: other programs do not count.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from mmdet3d.registry import MODELS
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope

import mmdcnv4.bevformer_v2  # noqa: F401  registers the classes
from mmdcnv4.bevformer_v2.data.transforms import PackBEVInputs
from mmdcnv4.bevformer_v2.models.detector import Geometry
from mmdcnv4.bevformer_v2.targets.mono_targets import MonoTargets
from mmdcnv4.datasets import synthetic_rig

HEIGHT, WIDTH, FOCAL = 640, 1600, 1266.0  # pixels of the network image of nuScenes
OBJECTS, SPEED = 40, 8.0  # per sample; metres per second, straight ahead


def resident() -> dict[str, float]:
    """GiB of the process: now (`VmRSS`) and at most so far (`VmHWM`); Linux."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return {line.split(':')[0]: int(line.split()[1]) / 2**20 for line in lines
            if line.startswith(('VmRSS', 'VmHWM'))}


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """Those in dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_of(item)


class Clock:
    """CPU seconds and memory by the name of a part; 'all' has all others in it.

    The backward pass goes through the parts in the opposite order: that of a part begins where the
    first gradient of its results is complete, and ends where that of another part begins.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.memory: dict[str, dict[str, float]] = {}
        self._start, self._backward_of = 0.0, ''

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what is inside."""
        start = time.process_time()
        yield
        self._stop(name, start)

    def _stop(self, name: str, start: float) -> None:
        self.seconds[name].append(time.process_time() - start)
        self.memory[name] = resident()
        print(f'{name}: {self.seconds[name][-1]:.1f}', file=sys.stderr, flush=True)

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Times a method of an object; calls without gradients in training are of the history."""
        function, in_training = getattr(owner, method), owner.training

        def timed(*args: Any, **kwargs: Any) -> Any:
            past = in_training and not torch.is_grad_enabled()  # modules say they evaluate then
            with self.part(f'{name}, history' if past else name):
                result = function(*args, **kwargs)
            for tensor in tensors_of(result):
                if tensor.requires_grad:
                    tensor.register_hook(lambda _: self._reach(name))
            return result

        setattr(owner, method, timed)

    def backward(self, loss: torch.Tensor) -> None:
        """Times the backward pass, part by part."""
        self._start, self._backward_of = time.process_time(), ''
        loss.backward()
        self._reach('')

    def _reach(self, name: str) -> None:
        """The backward pass is at the results of this part."""
        if name == self._backward_of:
            return
        if self._backward_of:
            self._stop(f'{self._backward_of}, backward', self._start)
        self._start, self._backward_of = time.process_time(), name

    def report(self, title: str) -> None:
        """Prints a table."""
        print(f'\n{title}; {torch.get_num_threads()} threads, torch {torch.__version__}')
        print('| part | calls | CPU seconds together | GiB after it | GiB at most so far |\n'
              '| --- | --- | --- | --- | --- |')
        for name, values in self.seconds.items():
            memory = self.memory[name]
            print(f'| {name} | {len(values)} | {sum(values):.2f} | {memory["VmRSS"]:.1f} | '
                  f'{memory["VmHWM"]:.1f} |')


def make_config(path: str, scale: float, with_cp: bool) -> Config:
    """The config with image and BEV plane at a scale, without published weights."""
    cfg = Config.fromfile(path)
    if with_cp:
        cfg.merge_from_dict({'model.img_backbone.with_cp': True, 'model.bev_encoder.with_cp': True,
                             'model.bev_head.layer_cfg': dict(with_cp=True)})
    cfg.model.img_backbone.init_cfg = None
    for part in ('bev_encoder', 'temporal_fusion', 'bev_head'):
        if cfg.model.get(part):
            cfg.model[part].bev_size = [round(scale * side) for side in (200, 200)]
    return cfg


def make_sample(frames: Sequence[int], now: int, scale: float) -> dict:
    """What the pipeline gives for key frame `now` of the drive."""
    height, width = round(scale * HEIGHT), round(scale * WIDTH)
    rng = np.random.default_rng(0)
    cam2img = np.eye(4)
    cam2img[:2, :3] = [[FOCAL * scale, 0, width / 2], [0, FOCAL * scale, 0.36 * height]]
    lidar2cam = [np.linalg.inv(synthetic_rig.camera2ego(degrees)) @ synthetic_rig.LIDAR2EGO
                 for degrees in synthetic_rig.CAMERAS.values()]
    motion = [np.eye(4) for _ in frames]
    for frame, matrix in zip(frames, motion):
        matrix[1, 3] = -SPEED * synthetic_rig.PERIOD * frame
    boxes = np.zeros((OBJECTS, 9), np.float32)
    boxes[:, :2], boxes[:, 2] = rng.uniform(-45, 45, (OBJECTS, 2)), -1.0
    boxes[:, 3:6], boxes[:, 6] = (4.6, 2.0, 1.7), rng.uniform(-3, 3, OBJECTS)
    labels = rng.integers(0, 10, OBJECTS)
    results = dict(
        frames=tuple(frames), cameras=tuple(synthetic_rig.CAMERAS), label_mapping=list(range(10)),
        image_transform=np.eye(3), ori_shape=(height, width), img_shape=(height, width),
        cam2img=np.tile(cam2img, (len(frames), 6, 1, 1)),
        lidar2cam=np.array([[matrix @ step for matrix in lidar2cam] for step in motion]),
        frame_valid=np.ones(len(frames), bool), sample_idx=now, token=str(now),
        frame_tokens={index: f'key-{now + frame}' for index, frame in enumerate(frames)},
        instances=[dict(bbox_3d=box[:7].tolist(), bbox_label_3d=int(label), velocity=[0.0, 0.0])
                   for box, label in zip(boxes, labels)],
        gt_bboxes_3d=LiDARInstance3DBoxes(boxes, box_dim=9, origin=(0.5, 0.5, 0.5)),
        gt_labels_3d=labels,
        img=[np.random.default_rng(100 + now + frame).integers(0, 256, (height, width, 3), np.uint8)
             for frame in frames for _ in range(6)])
    return PackBEVInputs()(MonoTargets()(results))


def watch(model: Any) -> Clock:
    """A clock on the parts of the model."""
    clock = Clock()
    clock.wrap(model, 'extract_feat', 'backbone and neck')
    clock.wrap(model, '_encode', 'BEV encoder')
    clock.wrap(model, '_fuse', 'fusion')
    if not model.training:
        clock.wrap(model.bev_head, 'forward', 'decoder')
        return clock
    clock.wrap(model.bev_head, 'loss', 'decoder and its loss')
    if model.perspective_head is not None:
        clock.wrap(model.perspective_head, 'loss', 'perspective head and its loss')
    return clock


def train_step(model: Any, sample: dict, amp: Optional[torch.dtype]) -> None:
    """One forward and backward pass of the losses."""
    model.train()
    data = model.data_preprocessor(pseudo_collate([sample]), True)
    clock = watch(model)
    with clock.part('all'):
        with torch.autocast('cpu', dtype=amp, enabled=amp is not None):
            loss, _ = model.parse_losses(model(**data, mode='loss'))
        clock.backward(loss)
    clock.report(f'training step, loss {float(loss.detach()):.4f}')


def fill_cache(model: Any, data: dict) -> None:
    """Noise in the place of the maps of past frames: their time alone counts here."""
    images = data['inputs']['imgs'].unflatten(1, (len(model.frames), -1))
    geometry = Geometry.of(data['data_samples'], images.device)
    height, width = images.shape[-2:]
    channels = model.img_neck.out_channels

    def noise(*_: Any) -> list[torch.Tensor]:
        return [torch.randn(1, images.shape[2], channels, -(-height // stride), -(-width // stride))
                for stride in (8, 16, 32, 64, 128)]

    model.extract_feat = noise
    for frame in geometry.frames:
        if frame != model.current:
            model._maps(images, geometry, frame, data['data_samples'])
    del model.extract_feat


@torch.no_grad()
def predict(model: Any, scale: float) -> None:
    """Predicts a sample."""
    model.eval()
    data = model.data_preprocessor(pseudo_collate([make_sample(model.frames, 0, scale)]), False)
    if model.map_cache.capacity:
        fill_cache(model, data)
    clock = watch(model)
    with clock.part('all'):
        model(**data, mode='predict')
    clock.report('prediction of a sample, ' + (
        'maps of the past in the cache' if model.map_cache.capacity else 'without a cache'))


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description='Time and memory per part of BEVFormer v2.')
    parser.add_argument('config')
    parser.add_argument('--train', action='store_true', help='a training step, else predictions')
    parser.add_argument('--scale', type=float, default=1.0, help='of image and BEV plane')
    parser.add_argument('--with-cp', action='store_true', help='layers are computed twice')
    parser.add_argument('--bfloat16', action='store_true', help='autocast of a training step')
    parser.add_argument('--cached', action='store_true', help='predict with model.cache_maps')
    args = parser.parse_args()
    cfg = make_config(args.config, args.scale, args.with_cp)
    cfg.model.cache_maps = args.cached
    with DefaultScope.overwrite_default_scope('mmdet3d'):
        torch.manual_seed(0)
        model = revert_sync_batchnorm(MODELS.build(cfg.model))
        if args.train:
            train_step(model, make_sample(model.frames, 0, args.scale),
                       torch.bfloat16 if args.bfloat16 else None)
        else:
            predict(model, args.scale)


if __name__ == '__main__':
    main()
