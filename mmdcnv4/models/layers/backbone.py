# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What all backbones do in the same way: weights, freezing, image check, recomputation."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Optional, Union

import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from ...errors import user_errors
from ..checkpoint import FLASH_WEIGHTS, WeightRules, load_pretrained
from .arguments import Arguments

_FOREIGN_WEIGHTS = ('open-mmlab://', 'torchvision://', 'mmcls://', 'mmpretrain://')


def recompute(function: Callable[..., Any], *inputs: Any, preserve_rng_state: bool = True,
              norms_of: Optional[nn.Module] = None) -> Any:
    """Calls `function`, and once more in the backward pass, instead of keeping what it computes.

    Args:
        function: of tensors; may use parameters of a module, which get their gradients.
        inputs: its arguments.
        preserve_rng_state: whether both calls draw the same random numbers.
        norms_of: a module whose batch norms `function` uses; their running statistics then count
            the batch once and not twice.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    options: dict[str, Any] = {}
    if norms_of is not None:
        options['context_fn'] = lambda: (nullcontext(), _no_running_statistics(norms_of))
    return checkpoint(function, *inputs, use_reentrant=False,
                      preserve_rng_state=preserve_rng_state, **options)


@contextmanager
def _no_running_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms in training normalise as ever, but leave their running statistics alone."""
    norms = [norm for norm in module.modules()
             if isinstance(norm, _BatchNorm) and norm.training and norm.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum
            if norm.num_batches_tracked is not None:
                norm.num_batches_tracked.sub_(1)


def full_precision(x: Tensor) -> AbstractContextManager:
    """A context without autocast on the device of `x`; some devices, such as meta, have none."""
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


class Backbone(BaseModule):
    """Base of the backbones: maps (N, C, H, W) to a tuple of feature maps.

    A subclass sets `out_indices`, overrides the methods that say what is frozen, and ends its
    constructor with `self._freeze()`.

    Args:
        init_cfg: None, `dict(type='Pretrained', checkpoint=path or URL)` (any published layout,
            see :func:`mmdcnv4.models.checkpoint.load_pretrained`), or initialisers of mmengine.
        pretrained: accepted because mmsegmentation passes `model.pretrained` on. A model-zoo name
            of another backbone is ignored with a warning.

    Raises:
        ValueError: `init_cfg` or `pretrained` is anything else.
    """

    init_cfg: Any
    out_indices: tuple[int, ...]
    # which tensors of a published file may be left over or missing, and where such files are
    weight_rules: WeightRules = FLASH_WEIGHTS

    def __init__(self, init_cfg: Union[dict, list, None] = None,
                 pretrained: Optional[str] = None) -> None:
        self._check_init_cfg(init_cfg)
        super().__init__(init_cfg=init_cfg)
        self._refuse_pretrained(pretrained)

    def _dump_init_info(self) -> None:
        """To the log file alone: MMEngine prints two lines per parameter where there is none."""
        handlers = MMLogger.get_current_instance().handlers
        if any(isinstance(handler, logging.FileHandler) for handler in handlers):
            super()._dump_init_info()

    def _check_init_cfg(self, init_cfg: Any) -> None:
        if init_cfg is None or isinstance(init_cfg, Mapping) and not init_cfg:
            return
        for cfg in init_cfg if isinstance(init_cfg, (list, tuple)) else [init_cfg]:
            if not isinstance(cfg, Mapping) or 'type' not in cfg:
                raise Arguments(type(self).__name__).refuse(
                    'init_cfg', "None, dict(type='Pretrained', checkpoint=...), or initialisers "
                    'of mmengine, each a dict with a type', init_cfg)

    def _refuse_pretrained(self, pretrained: Optional[str]) -> None:
        if pretrained is None:
            return
        name = type(self).__name__
        if not isinstance(pretrained, str) or not pretrained.startswith(_FOREIGN_WEIGHTS):
            raise Arguments(name).refuse(
                'pretrained', "None, give init_cfg=dict(type='Pretrained', checkpoint=...) instead",
                pretrained)
        warnings.warn(f'{name}: pretrained={pretrained!r} names weights of another backbone and is '
                      'ignored; set model.pretrained=None and give the backbone an init_cfg',
                      stacklevel=4)

    def _reset_parameters(self) -> None:
        """Initial values of all parameters."""
        raise NotImplementedError

    def _reset_core_ops(self) -> None:
        """Initial values that hold whatever initialisers `init_cfg` names; none by default."""

    def init_weights(self) -> None:
        """Sets the initial values, then those of `init_cfg`.

        As everywhere in mmengine a second call changes nothing and logs a warning.

        Raises:
            FileNotFoundError, ValueError: from the file that `init_cfg` names.
        """
        if self.is_init:
            super().init_weights()
            return
        init_cfg = self.init_cfg
        configs = [] if not init_cfg else [init_cfg] if isinstance(init_cfg, dict) else init_cfg
        pretrained = [cfg for cfg in configs if cfg['type'] in ('Pretrained', PretrainedInit)]
        self._reset_parameters()
        self.init_cfg = [cfg for cfg in configs if cfg not in pretrained]
        try:
            super().init_weights()
        finally:
            self.init_cfg = init_cfg
        self._reset_core_ops()
        for cfg in pretrained:
            load_pretrained(self, **self._pretrained_arguments(cfg), rules=self.weight_rules)

    @user_errors
    def _pretrained_arguments(self, cfg: Mapping[str, Any]) -> dict[str, Any]:
        arguments = {key: value for key, value in cfg.items() if key not in ('type', '_scope_')}
        known = ('checkpoint', 'prefix', 'map_location')
        if 'checkpoint' not in arguments or not set(arguments) <= set(known):
            raise ValueError(f"{type(self).__name__}: init_cfg of type 'Pretrained' must have "
                             f'checkpoint and nothing but {known}, got {dict(cfg)}')
        return arguments

    def _frozen_modules(self) -> Sequence[nn.Module]:
        """What `frozen_stages` names: no gradients, evaluation mode."""
        return ()

    def _unused_modules(self) -> Sequence[nn.Module]:
        """What stands after the last output and never runs: no gradients.

        It stays in the state dict, as in the published files; DistributedDataParallel waits for
        a gradient of every parameter that is not frozen.
        """
        return ()

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.eval().requires_grad_(False)
        for module in self._unused_modules():
            module.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        """Sets the training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def _check_images(self, x: Tensor, in_channels: int) -> None:
        """Raises ValueError unless `x` has shape (N, in_channels, H, W) with at least one pixel."""
        if x.dim() != 4 or x.shape[1] != in_channels or 0 in x.shape[2:]:
            raise ValueError(f'{type(self).__name__}: x must have shape (N, {in_channels}, H, W) '
                             f'with H and W >= 1, got {tuple(x.shape)}')
