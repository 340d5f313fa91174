# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""From a config with all arguments applied to a Runner, for all task libraries."""

from __future__ import annotations

import logging
import re
from typing import Any

from mmengine.config import Config
from mmengine.logging import MMLogger, print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from ..checks.checkpoints import check_checkpoint
from ..checks.config import run_all, type_name
from ..checks.weights import check_match
from . import preflight
from .checkpoints import adopt_saved_seed, allow_mmengine_checkpoints
from .distributed import prepare_distributed

# What MMEngine says of every run before its first iteration, hundreds of lines long.
_ONLY_IN_THE_FILE = re.compile(
    r'\s*(-{8,}\s*System environment:|Config:\n|Hooks will be executed|paramwise_options -- )')


def _is_for_the_screen(record: logging.LogRecord) -> bool:
    return _ONLY_IN_THE_FILE.match(record.getMessage()) is None


class QuietRunner(Runner):
    """MMEngine's Runner whose system table, config and table of hooks go to the log file alone.

    Registered nowhere: a config that names a `runner_type` gets that one.
    """

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        """The logger of the run; see the class."""
        logger: MMLogger = super().build_logger(*args, **kwargs)
        for handler in logger.handlers:
            if type(handler) is logging.StreamHandler:
                handler.addFilter(_is_for_the_screen)
        return logger


def _add_hooks(cfg: Config, allow_mismatch: bool) -> None:
    """Adds the hooks of a safe run and the progress bar, unless the config has its own.

    MMEngine's own checkpoint hook gives its place to the one that never deletes first.
    """
    hooks = list(cfg.get('custom_hooks') or [])
    present = set(map(type_name, hooks))
    for hook in hooks:
        if type_name(hook) == 'RunChecksHook' and allow_mismatch:
            hook['allow_mismatch'] = True
    for hook in (dict(type='ProgressBarHook'), dict(type='InvalidLossHook'),
                 dict(type='ResumableRandomnessHook'),
                 dict(type='RunChecksHook', check_config=False, allow_mismatch=allow_mismatch)):
        if hook['type'] not in present:
            hooks.append(hook)
    cfg.custom_hooks = hooks
    defaults = dict(cfg.get('default_hooks') or {})
    defaults.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))  # as MMEngine does
    if type_name(defaults['checkpoint']) == 'CheckpointHook':  # None: no checkpoints are wanted
        defaults['checkpoint'] = dict(defaults['checkpoint'], type='SafeCheckpointHook')
    cfg.default_hooks = defaults


def build_runner(cfg: Config, splits: tuple[str, ...], allow_mismatch: bool = False) -> Runner:
    """Checks what can be checked, then builds the Runner.

    Args:
        cfg: the config with all arguments applied; hooks are added to it.
        splits: of 'train', 'val', 'test', the data the run reads.
        allow_mismatch: a checkpoint that is tested or resumed may be one of another model.

    Raises:
        UserError: something is missing, not writable or does not fit.
    """
    hint = preflight.missing_import(cfg)
    if hint:
        print_log(hint, level=30)
    preflight.check_folder(cfg.work_dir, '--work-dir')
    check_checkpoint(cfg.get('load_from'), 'load_from')
    run_all(cfg, splits)
    allow_mmengine_checkpoints()
    adopt_saved_seed(cfg)
    prepare_distributed(cfg)
    _add_hooks(cfg, allow_mismatch)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else QuietRunner.from_cfg(cfg)
    file = cfg.get('load_from')
    if file is not None and isinstance(runner.model, nn.Module):  # some runners build it later
        must_match = ('train' not in splits or cfg.get('resume', False)) and not allow_mismatch
        check_match(runner.model, preflight.read_shapes(file), file, cfg, must_match,
                    '--allow-mismatch')
    return runner
