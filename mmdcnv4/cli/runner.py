# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""From a config with all arguments applied to a Runner, for all task libraries."""

from __future__ import annotations

from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from . import preflight
from .checkpoints import allow_mmengine_checkpoints
from .distributed import prepare_distributed


def _add_progress_bar(cfg: Config) -> None:
    hooks = list(cfg.get('custom_hooks') or [])
    present = {hook.get('type') for hook in hooks if isinstance(hook, dict)}
    if 'ProgressBarHook' not in present:
        hooks.append(dict(type='ProgressBarHook'))
    cfg.custom_hooks = hooks


def build_runner(cfg: Config, splits: tuple[str, ...]) -> Runner:
    """Checks what can be checked, then builds the Runner.

    Args:
        cfg: the config with all arguments applied; a hook is added to it.
        splits: of 'train', 'val', 'test', the data the run reads.

    Raises:
        UserError: something is missing or not writable.
    """
    hint = preflight.missing_import(cfg)
    if hint:
        print_log(hint, level=30)
    preflight.check_folder(cfg.work_dir, '--work-dir')
    preflight.check_checkpoint(cfg.get('load_from'), 'load_from')
    preflight.check_datasets(cfg, splits)
    preflight.check_nuscenes_metric(cfg, splits)
    if cfg.get('load_from') is None:
        preflight.check_pretrained(cfg)
    allow_mmengine_checkpoints()
    prepare_distributed(cfg)
    _add_progress_bar(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    file = cfg.get('load_from')
    if file is not None and isinstance(runner.model, nn.Module):  # some runners build it later
        preflight.check_weights(runner.model, preflight.read_shapes(file), file)
    return runner
