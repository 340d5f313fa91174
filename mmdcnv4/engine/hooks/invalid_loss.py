# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Stops a training whose loss is not a number any more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Optional

import torch
from mmengine.dist import all_reduce, get_rank, is_distributed
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.structures import BaseDataElement

from ...errors import UserError

_FILES = ('img_path', 'lidar_path')
_NAMED = 8  # files of a batch that a message lists


def _number(value: Any) -> float:
    return float(value.detach() if isinstance(value, torch.Tensor) else value)


def batch_files(batch: Any) -> Iterator[str]:
    """The files of the samples of a batch, where the pipeline keeps them."""
    if isinstance(batch, BaseDataElement):
        for key in _FILES:
            value = batch.metainfo.get(key)
            yield from map(str, value if isinstance(value, (list, tuple)) else
                           [] if value is None else [value])
    elif isinstance(batch, dict):
        for value in batch.values():
            yield from batch_files(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from batch_files(value)


def any_process(value: bool) -> bool:
    """Whether it holds in any process of the run; every process must ask, and all stop alike."""
    if not is_distributed():
        return value
    flag = torch.tensor([int(value)])
    all_reduce(flag, 'max')
    return bool(flag.item())


@HOOKS.register_module()
class InvalidLossHook(Hook):
    """Ends a training in the iteration whose loss is NaN or infinite, before a checkpoint is saved.

    It is for all libraries; the tools of this package add it to every training. Only the sum, the
    entry `loss`, is looked at: a single term or an accuracy may be undefined for one batch. In a
    distributed run one bad process stops all of them.

    Args:
        stop: False to go on, with a warning each time.
        amp_tolerance: with a gradient scaler, which skips such a step by itself, so many bad
            iterations in a row are passed.

    Raises:
        UserError: names the iteration, the terms that are not finite, and the files of the batch.
    """

    priority = 'HIGH'

    def __init__(self, stop: bool = True, amp_tolerance: int = 20) -> None:
        self.stop = stop
        self.amp_tolerance = amp_tolerance
        self._in_a_row = 0

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None,
                         outputs: Optional[dict] = None) -> None:
        """Looks at the loss."""
        total = (outputs or {}).get('loss')
        is_bad = total is not None and not math.isfinite(_number(total))
        if not any_process(is_bad):
            self._in_a_row = 0
            return
        self._in_a_row += 1
        scaler = getattr(runner.optim_wrapper, 'loss_scaler', None)
        tolerance = self.amp_tolerance if scaler is not None and scaler.is_enabled() else 0
        text = self._describe(runner, data_batch, outputs or {}) if is_bad else (
            f'the loss of another process is not finite in iteration {runner.iter + 1}')
        if not self.stop or self._in_a_row <= tolerance:
            runner.logger.warning(text)
            return
        raise UserError(
            f'{text}. The checkpoints that are there are not touched. Usual causes: a learning '
            'rate that is too high, a std of 0 in the data_preprocessor, NaN in the input. To '
            "train on in spite of it: custom_hooks = [dict(type='InvalidLossHook', stop=False)]")

    @staticmethod
    def _describe(runner: Any, batch: Any, outputs: dict) -> str:
        terms = ', '.join(f'{name} {_number(value)}' for name, value in outputs.items()
                          if 'loss' in name and not math.isfinite(_number(value)))
        files = list(batch_files(batch))
        named = ', '.join(files[:_NAMED]) + (f' and {len(files) - _NAMED} more'
                                             if len(files) > _NAMED else '')
        rates = {f'{rate:.3g}' for group in runner.optim_wrapper.get_lr().values()
                 for rate in group}
        process = f' (process {get_rank()})' if is_distributed() else ''
        return (f'the loss is not finite in iteration {runner.iter + 1}, epoch {runner.epoch + 1}'
                f'{process}: {terms}; learning rate {", ".join(sorted(rates)[:3])}; batch: '
                f'{named or "of samples without a path"}')
