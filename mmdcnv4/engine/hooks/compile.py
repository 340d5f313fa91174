# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Compiles a part of a model by one line of its config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Union

from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn


@HOOKS.register_module()
class CompileHook(Hook):
    """Before a run, has `torch.compile` take parts of its model, in place::

        custom_hooks = [dict(type='CompileHook')]                             # the backbone
        custom_hooks = [dict(type='CompileHook', mode='reduce-overhead')]     # and a CUDA graph
        custom_hooks = [dict(type='CompileHook', modules=('backbone', 'neck'))]

    for training, validation and testing. Names in checkpoints stay as they are, and results differ
    by roundings. `Runner(compile=...)` of MMEngine takes a method of the whole model, with heads
    and losses that depend on data and break the graph; the backbones of this package make one.

    Compiling takes a minute or more, for training and for evaluation, and again for a second size
    of images or batch, for which PyTorch makes the sizes variable (`dynamic=False`: for each one).

    Args:
        modules: names of submodules, as in `model.named_modules()`.
        options: of `torch.compile`: `mode`, `dynamic`, `fullgraph`, `backend`.

    Raises:
        ValueError: the model has no submodule of such a name.
    """

    priority = 'VERY_LOW'  # after hooks that exchange modules

    def __init__(self, modules: Union[str, Sequence[str]] = ('backbone',), **options: Any) -> None:
        self.modules = (modules,) if isinstance(modules, str) else tuple(modules)
        self.options = options

    def before_run(self, runner: Any) -> None:
        """Compiles when a part is called for the first time."""
        model: nn.Module = runner.model.module if is_model_wrapper(runner.model) else runner.model
        known = dict(model.named_modules())
        for name in self.modules:
            if name not in known or not name:
                parts = ', '.join(part for part, _ in model.named_children())
                raise ValueError(f'CompileHook: modules must name parts of {type(model).__name__} '
                                 f'({parts}, or parts of them), got {name!r}')
        for name in self.modules:
            known[name].compile(**self.options)
