# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The checks of the tools for every trainer."""

from __future__ import annotations

import logging
import os
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS

from ...checks import checkpoints, config, samples, weights
from ...errors import InvalidValue

_OPTION = "custom_hooks = [dict(type='RunChecksHook', allow_mismatch=True)]"


@HOOKS.register_module()
class RunChecksHook(Hook):
    """Finds faults in the user's files before the first iteration, and names a sample that fails.

    The tools of this package run it by themselves; for `mim train` and other trainers:
    `custom_hooks = [dict(type='RunChecksHook')]`.

    With torch >= 2.6 it lets MMEngine read what MMEngine has saved, weights-only as before. A
    training that resumes without a `load_from` passes over checkpoints that are damaged.

    Args:
        check_config: look at the files that the config names before the run, and at the
            checkpoint that the run loads. The tools have already done it when the run begins.
        allow_mismatch: a checkpoint that is tested or resumed may be one of another model.
    """

    priority = 'VERY_HIGH'

    def __init__(self, check_config: bool = True, allow_mismatch: bool = False) -> None:
        self.check_config, self.allow_mismatch = check_config, allow_mismatch

    def before_run(self, runner: Any) -> None:
        """Checks the files of the config; from here on a pipeline names what it fails on.

        Raises:
            UserError: names the file and the entry of the config.
        """
        loops: dict[str, Any] = {split: getattr(runner, f'_{split}_loop', None)
                                 for split in config.SPLITS}
        ready = [split for split, loop in loops.items() if hasattr(loop, 'dataloader')]
        if self.check_config:
            self._check_checkpoint(runner, 'train' in ready)
            config.run_all(runner.cfg, tuple(ready))
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        for split in ready:
            labels = samples.label_range(model) if split == 'train' else None
            samples.check_samples_of(loops[split].dataloader.dataset, labels)

    @staticmethod
    def _check_checkpoint(runner: Any, trains: bool) -> None:
        """Before MMEngine reads a checkpoint: refuses a damaged one, or takes an older one."""
        checkpoints.allow_mmengine_checkpoints()
        file = runner._load_from
        if runner._has_loaded or file is not None and os.path.isdir(file):  # parts of a model
            return
        checkpoints.check_checkpoint(file, 'load_from')
        if file is None and runner._resume and trains:
            runner._load_from = checkpoints.find_resumable_checkpoint(runner.work_dir)
            runner._resume = runner._load_from is not None
            if not runner._resume:
                print_log(f'resume: {runner.work_dir} holds no checkpoint; training starts at the '
                          'beginning', logger='current', level=logging.WARNING)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Refuses weights of another model, and an optimizer that groups the parameters otherwise.

        In a training that begins with these weights, what does not fit is a warning.

        Raises:
            InvalidValue: says what differs, and how to go on.
        """
        path = runner._load_from
        if self.check_config or path is None:  # None: the newest of the work directory
            is_start = hasattr(runner._train_loop, 'dataloader') and not runner._resume
            weights.check_match(runner.model, weights.Shapes.of(checkpoint), str(path), runner.cfg,
                                not (is_start or self.allow_mismatch),
                                _OPTION if self.check_config else '--allow-mismatch')
        saved = checkpoint.get('optimizer')
        if not getattr(runner, '_resume', False) or not isinstance(saved, dict):
            return
        own = runner.optim_wrapper.state_dict()
        if 'param_groups' not in saved or 'param_groups' not in own:
            return  # several optimizers
        sizes = [[len(group['params']) for group in state['param_groups']]
                 for state in (saved, own)]
        if sizes[0] != sizes[1]:
            raise InvalidValue(
                f'cannot resume: the optimizer of the checkpoint has {len(sizes[0])} groups of '
                f'{sum(sizes[0])} parameters, that of the config {len(sizes[1])} of '
                f'{sum(sizes[1])}. Another frozen_stages, optim_wrapper.constructor or '
                'paramwise_cfg groups them otherwise; go back to the config of the checkpoint, or '
                'start a new run from its weights with load_from=<checkpoint> instead of resume.')
