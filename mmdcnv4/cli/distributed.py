# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Distributed runs without a GPU, by gloo.

MMEngine's own initialisation calls `torch.cuda.set_device`, and its wrapper of the model passes
device ids. Nor does it end the process group: a thread of gloo that still holds a tensor while
Python shuts down aborts the process, and a training that is done counts as failed.
"""

from __future__ import annotations

import datetime
import gc
import os
import subprocess

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from torch import distributed as dist

from ..checks.config import type_name, walk
from ..errors import UserError


def _first_slurm_host() -> str:
    command = ['scontrol', 'show', 'hostnames', os.environ['SLURM_NODELIST']]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]


def _set_rendezvous(launcher: str) -> None:
    """Gives torch.distributed the variables it reads, from those of the launcher."""
    env = os.environ
    if launcher == 'slurm':
        env['RANK'], env['WORLD_SIZE'] = env['SLURM_PROCID'], env['SLURM_NTASKS']
        env['LOCAL_RANK'] = env['SLURM_LOCALID']
        if not env.get('MASTER_ADDR'):
            env['MASTER_ADDR'] = _first_slurm_host()
    elif launcher == 'mpi':
        env['RANK'], env['WORLD_SIZE'] = env['OMPI_COMM_WORLD_RANK'], env['OMPI_COMM_WORLD_SIZE']
        env['LOCAL_RANK'] = env['OMPI_COMM_WORLD_LOCAL_RANK']
        env['MASTER_ADDR'] = env.get('MASTER_ADDR') or '127.0.0.1'
    env['MASTER_PORT'] = env.get('MASTER_PORT') or '29500'


def _local_rank(launcher: str) -> int:
    variable = {'slurm': 'SLURM_LOCALID', 'mpi': 'OMPI_COMM_WORLD_LOCAL_RANK'}.get(launcher,
                                                                                  'LOCAL_RANK')
    return int(os.environ.get(variable) or 0)


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


def leave_distributed() -> None:
    """Ends the process group; the last line of a program whose run is done.

    Call it when nothing refers to the runner any more: only then do the threads of gloo end. After
    a failure it must not be called, for the other processes may never come to the barrier.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        gc.collect()  # the reducer of the wrapped model holds the group
        dist.destroy_process_group()


def _replace_sync_bn(cfg: Config) -> None:
    """Synchronised batch normalisation exists on GPUs only."""
    replaced = 0
    for _, node in walk(cfg.model, 'model'):
        if type_name(node) in ('SyncBN', 'SyncBatchNorm'):
            node['type'] = 'BN'
            replaced += 1
    if replaced:
        print_log(f'SyncBN needs GPUs: {replaced} entries of the model use BN of each process '
                  'instead', level=30)
