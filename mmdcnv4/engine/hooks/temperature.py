# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Lowers the temperature of dynamic convolutions at the beginning of a training."""

from __future__ import annotations

from typing import Any, Optional

from mmengine.hooks import Hook
from mmengine.registry import HOOKS


@HOOKS.register_module()
class TemperatureAnnealingHook(Hook):
    """Calls `set_temperature` on every module that has it, before every training iteration.

    The temperature falls linearly from `start` to `end` over the first `epochs` and stays there;
    a large one lets all kernels learn before the model chooses among them. A resumed run goes on
    where it stopped.

    Args:
        start, end: temperatures, > 0.
        epochs: length of the fall, > 0; of the training data loader.

    Raises:
        ValueError: an argument is not a positive number, or no module has `set_temperature`.

    Source:
        Dynamic Mobile-Former: 30 to 1 over 10 epochs.
    """

    def __init__(self, start: float = 30.0, end: float = 1.0, epochs: float = 10) -> None:
        for name, value in dict(start=start, end=end, epochs=epochs).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f'TemperatureAnnealingHook: {name} must be a number > 0, '
                                 f'got {value!r}')
        self.start, self.end, self.epochs = start, end, epochs
        self._modules: list[Any] = []
        self._last: Optional[float] = None

    def temperature(self, progress: float) -> float:
        """The temperature after the part `progress` of the fall, from 0 to 1 and beyond."""
        return self.end + (self.start - self.end) * (1 - min(progress, 1.0))

    def before_train(self, runner: Any) -> None:
        """Finds the modules."""
        self._modules = [module for module in runner.model.modules()
                         if hasattr(module, 'set_temperature')]
        self._last = None
        if not self._modules:
            raise ValueError('TemperatureAnnealingHook: the model must have a module with '
                             f'set_temperature, got {type(runner.model).__name__}')

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Sets the temperature of this iteration, if it is another one."""
        length = self.epochs * len(runner.train_dataloader)
        temperature = self.temperature(runner.iter / length)
        if temperature != self._last:
            for module in self._modules:
                module.set_temperature(temperature)
            self._last = temperature
