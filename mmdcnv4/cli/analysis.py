# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Models without data, for the analysis tools."""

from __future__ import annotations

import importlib
import importlib.util
import math
from inspect import signature
from typing import Any

from mmengine.analysis import FlopAnalyzer
from mmengine.analysis.jit_handles import get_shape
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import Tensor, nn

from ..checks.config import LIBRARIES, default_scope
from ..errors import InvalidValue, UserError

PARTS = ('backbone', 'features', 'model')
_SAMPLES = {'mmdet': ('mmdet.structures', 'DetDataSample'),
            'mmseg': ('mmseg.structures', 'SegDataSample'),
            'mmpretrain': ('mmpretrain.structures', 'DataSample')}


def dcnv4_multiply_adds(inputs: list, outputs: list) -> int:
    """Multiply-adds of one traced call of the operator: 5 K per output element.

    Each of the K samples takes four for the interpolation and one for the mask.

    Args:
        inputs, outputs: values of the traced graph, in the order of the operator's schema.
    """
    kernel = [value.toIValue() for value in inputs[2].node().inputs()]
    points = math.prod(kernel) - int(inputs[8].toIValue())
    return 5 * points * math.prod(get_shape(outputs[0]))


def attention_multiply_adds(inputs: list, outputs: list) -> int:
    """Multiply-adds of one traced call of PyTorch's attention: both products, masked or not.

    Args:
        inputs, outputs: values of the traced graph: queries (..., L, E), keys (..., S, E) and
            values (..., S, V).
    """
    query, key, value = (get_shape(tensor) for tensor in inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def flop_analyzer(model: nn.Module, inputs: tuple) -> FlopAnalyzer:
    """mmengine's counter with what it needs to know of the operator; it does not print warnings.

    Args:
        model, inputs: what is traced, as mmengine takes them.
    """
    analyzer = FlopAnalyzer(model, inputs)
    analyzer.set_op_handle('mmdcnv4::dcnv4', dcnv4_multiply_adds)
    analyzer.set_op_handle('aten::scaled_dot_product_attention', attention_multiply_adds)
    return analyzer.unsupported_ops_warnings(False).uncalled_modules_warnings(False)


def build_model(cfg: Config) -> nn.Module:
    """The model of a config of any OpenMMLab library, its backbone without weights.

    Args:
        cfg: its `default_scope`, or the class of its model, names the library.

    Raises:
        UserError: the library is not installed, or is not known.
    """
    scope = default_scope(cfg)
    if scope is None:
        raise UserError(f'the config must have a default_scope, one of {LIBRARIES}.')
    if importlib.util.find_spec(scope) is None:
        raise UserError(f'the config needs {scope}, which is not installed')
    importlib.import_module(f'{scope}.models')
    if 'data_preprocessor' in cfg:  # as mmengine's runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    for name in ('backbone', 'img_backbone'):
        if name in cfg.model:
            cfg.model[name].init_cfg = None  # weights do not change the cost
    with DefaultScope.overwrite_default_scope(scope):
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
            raise InvalidValue(f'analysis: part must be one of {PARTS}, got {part!r}')
        scope = default_scope(cfg)
        if scope is None or scope not in _SAMPLES:
            raise InvalidValue(f'analysis: default_scope must be one of {tuple(_SAMPLES)}, '
                               f'got {scope!r}')
        self.scope, self.part = scope, part
        self.model: Any = build_model(cfg)

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
