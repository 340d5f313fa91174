# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Models without data, for the analysis tools."""

from __future__ import annotations

import importlib
from inspect import signature
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

PARTS = ('backbone', 'features', 'model')
_SAMPLES = {'mmdet': ('mmdet.structures', 'DetDataSample'),
            'mmseg': ('mmseg.structures', 'SegDataSample'),
            'mmpretrain': ('mmpretrain.structures', 'DataSample')}


def build_model(cfg: Config) -> nn.Module:
    """The model of a config of any OpenMMLab library, its backbone without weights.

    Args:
        cfg: its `default_scope` names the library.
    """
    importlib.import_module(f'{cfg.default_scope}.models')
    if 'data_preprocessor' in cfg:  # as mmengine's runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    for name in ('backbone', 'img_backbone'):
        if name in cfg.model:
            cfg.model[name].init_cfg = None  # weights do not change the cost
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return MODELS.build(cfg.model)


class ModelPart(nn.Module):
    """A model, or a part of it, as a function of images alone.

    Args:
        cfg: config of mmdet, mmseg or mmpretrain.
        part: 'backbone', 'features' (backbone and neck) or 'model' (all before decoding).

    Raises:
        ValueError: no such part, or a model of another library.
    """

    def __init__(self, cfg: Config, part: str = 'model') -> None:
        super().__init__()
        if part not in PARTS:
            raise ValueError(f'analysis: part must be one of {PARTS}, got {part!r}')
        if cfg.default_scope not in _SAMPLES:
            raise ValueError(f'analysis: default_scope must be one of {tuple(_SAMPLES)}, '
                             f'got {cfg.default_scope!r}')
        self.model: Any = build_model(cfg)
        self.scope, self.part = cfg.default_scope, part

    def forward(self, images: Tensor) -> Any:
        """Runs the part on normalised images (N, 3, H, W)."""
        if self.part == 'backbone':
            return self.model.backbone(images)
        if self.part == 'features':
            return self.model.extract_feat(images)
        module, name = _SAMPLES[self.scope]
        size = tuple(images.shape[2:])
        meta = dict(img_shape=size, ori_shape=size, pad_shape=size, batch_input_shape=size,
                    scale_factor=(1.0, 1.0))
        sample = getattr(importlib.import_module(module), name)
        samples = [sample(metainfo=meta) for _ in images]
        with DefaultScope.overwrite_default_scope(self.scope):
            head = getattr(self.model, 'decode_head', None)
            if head is not None and 'batch_data_samples' in signature(head.forward).parameters:
                return head(self.model.extract_feat(images), samples)  # mmseg leaves them out
            return self.model(images, samples, mode='tensor')
