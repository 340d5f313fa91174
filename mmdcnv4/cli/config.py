# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Reads the config of a run and applies the arguments of the command line to it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any, Optional

import torch
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log

from ..checks.checkpoints import check_checkpoint
from ..checks.config import default_scope, type_name
from ..errors import UserError
from ..safe_files import read_safely
from . import preflight
from .checkpoints import find_resumable_checkpoint

_VISUALIZATION_OPTIONS = {  # default_scope: names of (switch, output folder) in its hook
    'mmdet': ('draw', 'test_out_dir'),
    'mmdet3d': ('draw', 'test_out_dir'),
    'mmpretrain': ('enable', 'out_dir'),
    'mmseg': ('draw', None),  # goes where the visualizer saves
}


def read_config(path: str, options: Optional[dict] = None) -> Config:
    """Reads the config of a model and applies `--cfg-options`.

    Raises:
        UserError: the file is absent or is no config of a model.
    """
    if not os.path.isfile(path):
        raise UserError(f'the config {path} does not exist.')
    read_safely()
    try:
        cfg = Config.fromfile(path)
        cfg.merge_from_dict(options or {})
    except Exception as error:  # a config is a program, which fails in any way
        raise UserError(f'cannot read the config {path}: '
                        f'{type(error).__name__}: {error}') from error
    if cfg.get('model') is None:
        raise UserError(f'the config {path} defines no model.')
    return cfg


def load_config(args: argparse.Namespace) -> Config:
    """Reads the config and applies the common arguments.

    Raises:
        UserError: the file is absent or is no config of a model.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg = read_config(args.config, args.cfg_options)
    apply_data_root(cfg, getattr(args, 'data_root', None))
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(args.config).stem)
    return cfg


def apply_amp(cfg: Config) -> None:
    """Switches to mixed precision with a dynamic loss scale (`--amp`).

    Raises:
        UserError: another optimizer wrapper is in use, or there is no accelerator.
    """
    wrapper = cfg.get('optim_wrapper') or {}
    kind = type_name(wrapper) or 'OptimWrapper'
    if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
        raise UserError(f'--amp works with optim_wrapper.type=OptimWrapper, got {kind}.')
    if not torch.cuda.is_available():
        raise UserError('--amp needs a GPU; leave it out to train on the CPU.')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.loss_scale = wrapper.get('loss_scale', 'dynamic')


def apply_auto_scale_lr(cfg: Config) -> None:
    """Scales the learning rate with the batch of all processes (`--auto-scale-lr`).

    Raises:
        UserError: the config does not say which batch its learning rate is for.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise UserError('--auto-scale-lr needs to know the batch that the learning rate is for; '
                        'set auto_scale_lr = dict(base_batch_size=...) in the config.')
    cfg.auto_scale_lr.enable = True


def apply_resume(cfg: Config, resume: Optional[str]) -> None:
    """Continues from a checkpoint, or with 'auto' from the newest in the work directory.

    Args:
        cfg: the config; its own `resume` without a `load_from` means 'auto', too.
        resume: of the command line.

    Raises:
        UserError: the checkpoint does not exist.
    """
    is_own = bool(cfg.get('resume')) and cfg.get('load_from') is None
    if resume is None and is_own:
        resume = 'auto'
    if resume is None:
        return
    if resume == 'auto':
        resume = find_resumable_checkpoint(cfg.work_dir)
        if resume is None:
            if is_own:
                cfg.resume = False  # else MMEngine takes a damaged one
            print_log(f'--resume: {cfg.work_dir} holds no checkpoint; training starts at the '
                      'beginning', logger='current', level=30)
            return
    check_checkpoint(resume, '--resume')
    cfg.resume, cfg.load_from = True, resume


def apply_show(cfg: Config, show: bool, show_dir: Optional[str], wait_time: float) -> None:
    """Draws predictions on the screen or into `show_dir`.

    Raises:
        UserError: the config has no visualization hook, or its library has no such thing.
    """
    if not show and show_dir is None:
        return
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    scope = default_scope(cfg)
    if hook is None or scope not in _VISUALIZATION_OPTIONS:
        raise UserError('--show and --show-dir need a visualization hook in default_hooks and a '
                        f'default_scope of {sorted(_VISUALIZATION_OPTIONS)}, got {scope}.')
    if type_name(cfg.model).endswith('BEVFormerV2'):
        raise UserError('--show and --show-dir: the hook of mmdet3d draws one camera, '
                        f'{type_name(cfg.model)} has several; use tools/demo/bev_demo.py.')
    switch, folder = _VISUALIZATION_OPTIONS[scope]
    hook[switch] = True
    hook.interval = 1
    if show:
        hook.show, hook.wait_time = True, wait_time
    if show_dir is None:
        return
    preflight.check_folder(show_dir, '--show-dir')
    show_dir = os.path.abspath(show_dir)
    if folder is None:
        cfg.visualizer.save_dir = show_dir
        cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    else:
        hook[folder] = show_dir


def innermost(dataset: Any) -> Any:
    """The dataset inside RepeatDataset and the like, where the pipeline is."""
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset


def _replace_prefix(node: Any, old: str, new: str) -> Any:
    if isinstance(node, dict):
        for key, value in node.items():
            node[key] = _replace_prefix(value, old, new)
    elif isinstance(node, (list, tuple)):
        return type(node)(_replace_prefix(value, old, new) for value in node)
    elif isinstance(node, str) and (node.rstrip('/') + '/').startswith(old):
        rest = node[len(old):]
        return f'{new}{rest}' if rest or node.endswith('/') else new.rstrip('/')
    return node


def apply_data_root(cfg: Config, folder: Optional[str]) -> None:
    """Puts another folder in the place of the config's `data_root`, everywhere (`--data-root`).

    Datasets, metrics with an `ann_file` and all else that begins with the old folder follow.

    Raises:
        UserError: the config names no `data_root`, or the folder does not exist.
    """
    if folder is None:
        return
    if not os.path.isdir(os.path.expanduser(folder)):
        raise UserError(f'--data-root {folder}: the folder does not exist.')
    loaders = (cfg.get(f'{split}_dataloader') for split in ('train', 'val', 'test'))
    roots = [cfg.get('data_root')] + [innermost(loader.dataset).get('data_root')
                                      for loader in loaders if loader and 'dataset' in loader]
    olds = sorted({root.rstrip('/') + '/' for root in roots if root}, key=len, reverse=True)
    if not olds:
        raise UserError('--data-root needs a data_root in the config, at its top or in a dataset.')
    if len(olds) > 1:
        raise UserError(f'--data-root replaces one folder, and the config has {", ".join(olds)}: '
                        'set them with --cfg-options.')
    new = os.path.join(os.path.expanduser(folder), '')
    for key in list(cfg.keys()):
        if key not in ('work_dir', 'load_from'):
            cfg[key] = _replace_prefix(cfg[key], olds[0], new)


def apply_map_cache(cfg: Config) -> None:
    """Keeps the image maps of past frames where that is exact and cannot miss: see `cache_maps`.

    That is in one process, with one sample at a time in the order of the file. An entry of the
    config is left as it is.
    """
    loader = cfg.get('test_dataloader') or {}
    in_order = not (loader.get('sampler') or {}).get('shuffle', True)
    if (str(cfg.model.get('type')).endswith('BEVFormerV2') and 'cache_maps' not in cfg.model
            and cfg.get('launcher', 'none') == 'none' and loader.get('batch_size') == 1
            and in_order):
        cfg.model.cache_maps = True


def apply_tta(cfg: Config) -> None:
    """Test-time augmentation as the config defines it.

    Raises:
        UserError: the config does not define it.
    """
    missing = [name for name in ('tta_model', 'tta_pipeline') if name not in cfg]
    if missing:
        raise UserError(f'--tta needs {" and ".join(missing)} in the config.')
    innermost(cfg.test_dataloader.dataset).pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def dump_metric(cfg: Config, out: str) -> dict:
    """The metric that writes predictions to a pickle file (`--out`).

    Raises:
        UserError: the file has another ending, or cannot be written.
    """
    preflight.check_file(out, '--out', ('.pkl', '.pickle'))
    kind = 'mmdet.DumpDetResults' if default_scope(cfg) == 'mmdet' else 'DumpResults'
    return dict(type=kind, out_file_path=out)
