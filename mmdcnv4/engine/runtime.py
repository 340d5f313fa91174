# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""From a command line to a Runner: what `tools/train.py` and `tools/test.py` share.

MMEngine 0.10.7 does most of it. Added here, for all task libraries:

- checkpoints of MMEngine load with torch >= 2.6, which reads weights only: the few types that
  MMEngine stores beside weights are allow-listed, and nothing else;
- distributed runs without a GPU (gloo): MMEngine's own initialisation calls
  `torch.cuda.set_device`, and its wrapper of the model passes device ids;
- `--resume` goes to the newest checkpoint that is whole, also after a kill during a write;
- faults in the user's files end in one clear line (see `preflight.py`).
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import os
import pickle
import re
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.logging import HistoryBuffer, print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import distributed as dist
from torch import nn

from . import preflight, progress  # noqa: F401  (registers the progress bar)
from .inheritance import forget_scope
from .preflight import UserError

_HISTORY_METHODS = ('min', 'max', 'current', 'mean')
_VISUALIZATION_OPTIONS = {  # default_scope: names of (switch, output folder) in its hook
    'mmdet': ('draw', 'test_out_dir'),
    'mmdet3d': ('draw', 'test_out_dir'),
    'mmpretrain': ('enable', 'out_dir'),
    'mmseg': ('draw', None),  # goes where the visualizer saves
}


# ---------------------------------------------------------------------------------- checkpoints


def _history_method(owner: type, name: str) -> Callable:
    """Stands in for `getattr` in checkpoints, for the one use that MMEngine makes of it.

    The real `getattr` reaches `__globals__` and, from there, everything.
    """
    if owner is not HistoryBuffer or name not in _HISTORY_METHODS:
        raise pickle.UnpicklingError(f'refused: the attribute {name!r} of {owner!r}')
    return getattr(owner, name)


def allow_mmengine_checkpoints() -> None:
    """Allow-lists the types that MMEngine 0.10.7 stores in checkpoints beside weights.

    These are the histories of logged values with their four statistics, numpy's scalars and
    arrays, and the plain numeric dtypes of both; none of them runs foreign code when it is
    unpickled. Both names that numpy 1 and 2 give to its functions are accepted, so checkpoints
    pass from one to the other. Before torch 2.6 nothing needs to be done.
    """
    if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6):
        return  # torch.load is not weights-only there, and no function can stand in for another
    core = 'numpy._core' if int(np.__version__.split('.')[0]) >= 2 else 'numpy.core'
    multiarray = importlib.import_module(f'{core}.multiarray')
    allowed: list[Any] = [HistoryBuffer, np.ndarray, np.dtype,
                          (_history_method, 'builtins.getattr'),
                          (_history_method, '__builtin__.getattr')]
    allowed += [type(np.dtype(name)) for name in (
        'bool', 'int8', 'uint8', 'int16', 'int32', 'int64', 'float16', 'float32', 'float64')]
    for name in ('_reconstruct', 'scalar'):
        function = getattr(multiarray, name)
        allowed += [(function, f'numpy.core.multiarray.{name}'),
                    (function, f'numpy._core.multiarray.{name}')]
    torch.serialization.add_safe_globals(allowed)


def find_resumable_checkpoint(work_dir: str) -> Optional[str]:
    """The checkpoint to continue from: the one named last if it is whole, else the newest whole.

    A process that is killed while it writes leaves a truncated file behind, and a file
    `last_checkpoint` that may name one which has been deleted to make room.
    """
    named = Path(work_dir) / 'last_checkpoint'
    candidates = [Path(named.read_text().strip())] if named.is_file() else []
    numbered = [(int(match[1]), file) for file in Path(work_dir).glob('*.pth')
                if (match := re.fullmatch(r'(?:epoch|iter)_(\d+)', file.stem))]
    candidates += [file for _, file in sorted(numbered, reverse=True)]
    for file in candidates:
        if file.is_file() and zipfile.is_zipfile(file):
            return str(file)
    return None


# ---------------------------------------------------------------------------------- distributed


def _first_slurm_host() -> str:
    command = ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]


def _set_rendezvous(launcher: str) -> None:
    """Gives torch.distributed the variables it reads, from those of the launcher."""
    env = os.environ
    if launcher == 'slurm':
        env['RANK'], env['WORLD_SIZE'] = env['SLURM_PROCID'], env['SLURM_NTASKS']
        env['LOCAL_RANK'] = env['SLURM_LOCALID']
        if 'MASTER_ADDR' not in env:
            env['MASTER_ADDR'] = _first_slurm_host()
    elif launcher == 'mpi':
        env['RANK'], env['WORLD_SIZE'] = env['OMPI_COMM_WORLD_RANK'], env['OMPI_COMM_WORLD_SIZE']
        env['LOCAL_RANK'] = env['OMPI_COMM_WORLD_LOCAL_RANK']
        env.setdefault('MASTER_ADDR', '127.0.0.1')
    env.setdefault('MASTER_PORT', '29500')


def _local_rank(launcher: str) -> int:
    variable = {'slurm': 'SLURM_LOCALID', 'mpi': 'OMPI_COMM_WORLD_LOCAL_RANK'}.get(launcher,
                                                                                  'LOCAL_RANK')
    return int(os.environ.get(variable, 0))


def prepare_distributed(cfg: Config) -> None:
    """Initialises the process group with gloo where there is no GPU, and adapts the config to it.

    With GPUs nothing is done but a check: MMEngine initialises nccl itself.

    Args:
        cfg: the config; `launcher` is read, `model_wrapper_cfg` and `model` may be changed.

    Raises:
        UserError: there are fewer GPUs than processes, or a variable of the launcher is missing.
    """
    launcher = cfg.get('launcher', 'none')
    if launcher == 'none':
        return
    if torch.cuda.is_available():
        if _local_rank(launcher) >= torch.cuda.device_count():
            raise UserError(f'this machine has {torch.cuda.device_count()} GPU(s), and more '
                            'processes were started; start as many as there are GPUs, or hide '
                            'the GPUs with CUDA_VISIBLE_DEVICES=-1 to run on the CPU.')
        return
    if not dist.is_initialized():
        try:
            _set_rendezvous(launcher)
            dist_cfg = (cfg.get('env_cfg') or {}).get('dist_cfg') or {}
            timeout = datetime.timedelta(seconds=dist_cfg.get('timeout') or 1800)
            dist.init_process_group('gloo', timeout=timeout)
        except (KeyError, ValueError) as error:
            raise UserError(f'--launcher {launcher} needs the environment of that launcher, but '
                            f'{error}; use tools/dist_train.sh or tools/slurm_train.sh') from error
    wrapper = dict(type='MMDistributedDataParallel', broadcast_buffers=False,
                   find_unused_parameters=cfg.get('find_unused_parameters', False))
    wrapper.update(cfg.get('model_wrapper_cfg') or {})
    cfg.model_wrapper_cfg = dict(wrapper, device_ids=None)  # MMEngine's default names a GPU
    _replace_sync_bn(cfg)


def _replace_sync_bn(cfg: Config) -> None:
    """Synchronised batch normalisation exists on GPUs only."""
    replaced = 0
    for _, node in preflight._walk(cfg.model, 'model'):
        if node.get('type') == 'SyncBN':
            node['type'] = 'BN'
            replaced += 1
    if replaced:
        print_log(f'SyncBN needs GPUs: {replaced} entries of the model use BN of each process '
                  'instead', level=30)


# ----------------------------------------------------------------------------- the command lines


class OptionsAction(DictAction):
    """KEY=VALUE pairs as a dict, the values as Python reads them."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any,
                 option_string: Optional[str] = None) -> None:
        """Adds the pairs, and names what is none."""
        for value in values:
            if '=' not in value:
                raise argparse.ArgumentError(self, f'must be KEY=VALUE, got {value!r}')
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, RecursionError):  # what MMEngine makes of brackets and of dicts
            raise argparse.ArgumentError(
                self, 'a value must be a number, a text, "[a,b]" or "(a,b)"; a dict is set entry '
                f'by entry, KEY.ENTRY=VALUE; got {values}') from None


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of every program that reads a config."""
    parser.add_argument('--cfg-options', nargs='+', action=OptionsAction, metavar='KEY=VALUE',
                        help='override entries of the config, e.g. train_cfg.max_epochs=1 '
                        'model.backbone.init_cfg=None data.list="[1,2]"')
    parser.add_argument('--debug', action='store_true',
                        help='show the traceback of every error')


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that training and testing share, under their OpenMMLab names."""
    add_config_arguments(parser)
    parser.add_argument('--work-dir', help='folder of logs and checkpoints; '
                        'default: work_dir of the config, else work_dirs/<name of the config>')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'],
                        default='none', help='what started the processes')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0,
                        help='set by some launchers')


def read_config(path: str, options: Optional[dict] = None) -> Config:
    """Reads the config of a model and applies `--cfg-options`.

    Raises:
        UserError: the file is absent or is no config of a model.
    """
    if not os.path.isfile(path):
        raise UserError(f'the config {path} does not exist.')
    try:
        cfg = Config.fromfile(path)
        forget_scope(cfg._cfg_dict)
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
    kind = wrapper.get('type', 'OptimWrapper')
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

    Raises:
        UserError: the checkpoint does not exist.
    """
    if resume is None:
        return
    if resume == 'auto':
        resume = find_resumable_checkpoint(cfg.work_dir)
        if resume is None:
            print_log(f'--resume: {cfg.work_dir} holds no checkpoint; training starts at the '
                      'beginning', logger='current', level=30)
            return
    preflight.check_checkpoint(resume, '--resume')
    cfg.resume, cfg.load_from = True, resume


def apply_show(cfg: Config, show: bool, show_dir: Optional[str], wait_time: float) -> None:
    """Draws predictions on the screen or into `show_dir`.

    Raises:
        UserError: the config has no visualization hook, or its library has no such thing.
    """
    if not show and show_dir is None:
        return
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    scope = cfg.get('default_scope')
    if hook is None or scope not in _VISUALIZATION_OPTIONS:
        raise UserError('--show and --show-dir need a visualization hook in default_hooks and a '
                        f'default_scope of {sorted(_VISUALIZATION_OPTIONS)}, got {scope}.')
    if str(cfg.model.get('type')).endswith('BEVFormerV2'):
        raise UserError('--show and --show-dir: the hook of mmdet3d draws one camera, '
                        f'{cfg.model.type} has several; use tools/demo/bev_demo.py.')
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


def apply_tta(cfg: Config) -> None:
    """Test-time augmentation as the config defines it.

    Raises:
        UserError: the config does not define it.
    """
    missing = [name for name in ('tta_model', 'tta_pipeline') if name not in cfg]
    if missing:
        raise UserError(f'--tta needs {" and ".join(missing)} in the config.')
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def dump_metric(cfg: Config, out: str) -> dict:
    """The metric that writes predictions to a pickle file (`--out`).

    Raises:
        UserError: the file has another ending, or cannot be written.
    """
    preflight.check_file(out, '--out', ('.pkl', '.pickle'))
    kind = 'DumpDetResults' if cfg.get('default_scope') == 'mmdet' else 'DumpResults'
    return dict(type=kind, out_file_path=out)


# ---------------------------------------------------------------------------------------- runner


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
