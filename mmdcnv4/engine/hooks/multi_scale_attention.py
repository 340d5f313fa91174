# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Lets a model compute multi-scale deformable attention with the kernels of this package."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class MultiScaleAttentionHook(Hook):
    """Before a run, calls :func:`mmdcnv4.models.layers.use_multi_scale_attention` on its model.

    DINO, Deformable DETR and the pixel decoder of Mask2Former build mmcv's attention by name, which
    no config can change; this one line does, for training as for testing::

        custom_hooks = [dict(type='MultiScaleAttentionHook')]

    Raises:
        ValueError: the model has no such attention.
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner: Any) -> None:
        """Changes the model."""
        # mmcv.ops is an import of its own, which fails with mmcv-lite
        from ...models.layers.multi_scale_attention import use_multi_scale_attention
        if not use_multi_scale_attention(runner.model):
            raise ValueError('MultiScaleAttentionHook: the model must have a '
                             'MultiScaleDeformableAttention of mmcv, '
                             f'got {type(runner.model).__name__}')
