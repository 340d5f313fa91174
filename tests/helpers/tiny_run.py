# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A training of seconds with everything random that a real one has; for runs that are killed.

Registered in MMEngine by import: a config names `helpers.tiny_run` in `custom_imports`.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from mmdcnv4.models.layers import DCNv4Conv2d

_CONFIG = """
custom_imports = dict(imports=['mmdcnv4', 'helpers.tiny_run'], allow_failed_imports=False)
default_scope = 'mmengine'
model = dict(type='TinyModel', seconds={seconds}, extra={extra})
train_dataloader = dict(
    batch_size=4, num_workers={workers}, persistent_workers={workers} > 0,
    dataset=dict(type='NoisyPictures'), sampler=dict(type='{sampler}', shuffle=True))
train_cfg = dict({loop})
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-2))
param_scheduler = dict(type='CosineAnnealingLR', T_max={length}, by_epoch={by_epoch})
custom_hooks = [dict(type='EMAHook', momentum=0.05)]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1),
    checkpoint=dict(type='CheckpointHook', interval={interval}, by_epoch={by_epoch},
                    max_keep_ckpts={keep}))
randomness = dict(seed={seed}, deterministic=True)
"""


@DATASETS.register_module()
class NoisyPictures(torch.utils.data.Dataset):
    """24 pictures of 8 x 8 with noise from Python, NumPy and PyTorch."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict:
        picture = torch.full((3, 8, 8), index / 24)
        picture += torch.rand(3, 8, 8) * random.random() + float(np.random.rand())
        sample = BaseDataElement(metainfo=dict(img_path=f'picture-{index}.png'))
        return dict(inputs=picture, data_samples=sample)


@MODELS.register_module()
class TinyModel(BaseModel):
    """DCNv4, batch norm, dropout and a linear layer.

    Args:
        seconds: that a step takes in addition, so that a kill meets it.
        nan_at: number of the training step whose loss is NaN.
        extra: numbers that make a checkpoint larger.
    """

    def __init__(self, seconds: float = 0.0, nan_at: int = -1, extra: int = 1) -> None:
        super().__init__()
        self.conv = DCNv4Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 1)
        self.extra = nn.Parameter(torch.zeros(extra))
        self.seconds, self.nan_at, self.step = seconds, nan_at, 0

    def forward(self, inputs: Any, data_samples: Any = None, mode: str = 'tensor') -> Any:
        """The loss, or what the head gives."""
        images = torch.stack(list(inputs))
        features = F.dropout(self.norm(self.conv(images)).relu(), 0.3, self.training)
        out: Tensor = self.head(features.mean((2, 3)))
        if mode != 'loss':
            return out
        time.sleep(self.seconds)
        self.step += 1
        target = images.mean((1, 2, 3))[:, None]
        out = out + self.extra[:1]
        return dict(loss_fit=F.mse_loss(out, target) * (
            float('nan') if self.step == self.nan_at else 1.0))


def write_config(file: Path, *, by_epoch: bool = True, length: int = 3, workers: int = 0,
                 interval: int = 1, keep: int = 2, seed: object = 1,
                 seconds: float = 0.0, extra: int = 1) -> Path:
    """Writes a config; `length` and `interval` in epochs of six iterations, or in iterations."""
    file.write_text(_CONFIG.format(
        loop=f'by_epoch=True, max_epochs={length}' if by_epoch else
        f"type='IterBasedTrainLoop', max_iters={length}",
        sampler='DefaultSampler' if by_epoch else 'InfiniteSampler', by_epoch=by_epoch,
        length=length, workers=workers, interval=interval, keep=keep, seed=seed, seconds=seconds,
        extra=extra))
    return file


def config(folder: Path, work_dir: Path, **options: Any) -> Config:
    """The config as an object, with a work directory."""
    cfg = Config.fromfile(write_config(folder / f'{work_dir.name}.py', **options))
    cfg.work_dir, cfg.experiment_name = str(work_dir), work_dir.name
    return cfg


def same_bits(first: Any, second: Any) -> bool:
    """Whether two contents of checkpoints hold the same tensors and numbers."""
    if isinstance(first, Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(
            same_bits(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same_bits, first, second))
    return first == second
