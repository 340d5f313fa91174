# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that survive a kill, a full disk and a NaN."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Union

import torch
from mmengine.dist import is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS

from ...errors import UserError
from .invalid_loss import any_process

_BACKEND = 'mmdcnv4_whole_files'
_PARTIAL = '.partial'  # extension of a file that is not whole yet


class WholeFilesBackend(LocalBackend):
    """Writes to a temporary name, synchronises with the disk, and then renames.

    Under its own name a file is whole at any moment, whatever kills the process.
    """

    def put(self, obj: bytes, filepath: Union[str, Path]) -> None:
        """Writes the file.

        Raises:
            UserError: the disk is full, or writing failed otherwise; what was there is whole.
        """
        path = Path(filepath)
        partial = path.with_name(f'.{path.name}{_PARTIAL}')
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, 'wb') as stream:
                stream.write(obj)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, path)
            _synchronise(path.parent)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise UserError(
                f'cannot write the checkpoint {path} of {len(obj) / 2**20:.1f} MiB: '
                f'{error.strerror}. The older checkpoints are whole; make room and resume the '
                'training.') from error


register_backend(_BACKEND, WholeFilesBackend, force=True)


def _synchronise(folder: Path) -> None:
    """Makes a rename last; not every file system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


class _RemovesLast:
    """A file backend whose removals wait; a file that was written anew meanwhile stays."""

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        self._waiting: list[tuple[str, str, int]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._waiting.append(('remove', path, os.stat(path).st_ino))

    def rmtree(self, path: str) -> None:
        self._waiting.append(('rmtree', path, os.stat(path).st_ino))

    def carry_out(self) -> None:
        for action, path, inode in self._waiting:
            if os.path.exists(path) and os.stat(path).st_ino == inode:
                getattr(self._backend, action)(path)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """MMEngine's `CheckpointHook`, which never leaves a run without a whole checkpoint.

    A file is written under a temporary name, synchronised and renamed, and only then the one
    that it replaces is removed: with `max_keep_ckpts=1`, too, where MMEngine removes the older
    one first. Weights that are NaN or infinite are not saved. The tools of this package put it in
    the place of `CheckpointHook`; for other trainers:
    `default_hooks = dict(checkpoint=dict(type='SafeCheckpointHook', ...))`.

    Args:
        kwargs: of `CheckpointHook`. With `backend_args` or `file_client_args`, and in an `out_dir`
            that is not on a local disk, files are written by that backend, in its way.

    Raises:
        UserError: a weight is not finite, or the file cannot be written.
    """

    backend_args: Any
    file_backend: Any

    def before_train(self, runner: Any) -> None:
        """Finds the folder, and takes away what a killed process left in it."""
        folder = str(self.out_dir or runner.work_dir)
        is_local = '://' not in folder and not self.backend_args and not self.file_client_args
        if is_local:
            self.backend_args = dict(backend=_BACKEND)
        super().before_train(runner)
        if is_local and is_main_process():
            for partial in Path(self.out_dir).glob(f'.*{_PARTIAL}'):
                partial.unlink(missing_ok=True)

    def _is_local(self) -> bool:
        return isinstance(self.file_backend, (LocalBackend, _RemovesLast))

    @contextmanager
    def _removals_last(self) -> Iterator[None]:
        backend = self.file_backend
        if not self._is_local():
            yield
            return
        waiting = self.file_backend = _RemovesLast(backend)
        try:
            yield
        finally:
            self.file_backend = backend
        waiting.carry_out()

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict) -> None:
        self._refuse_invalid_weights(runner)
        with self._removals_last():
            super()._save_checkpoint_with_step(runner, step, meta)

    def _save_best_checkpoint(self, runner: Any, metrics: dict) -> None:
        if self.save_best:
            self._refuse_invalid_weights(runner)
        with self._removals_last():
            super()._save_best_checkpoint(runner, metrics)

    @staticmethod
    def _refuse_invalid_weights(runner: Any) -> None:
        models = [runner.model, *(hook.ema_model for hook in runner.hooks
                                  if hasattr(hook, 'ema_model'))]
        bad = [name for model in models for name, value in model.named_parameters()
               if not torch.isfinite(value.detach()).all()]
        # buffers may hold infinities on purpose, such as masks of attention
        bad += [name for model in models for name, value in model.named_buffers()
                if value.is_floating_point() and torch.isnan(value).any()]
        if any_process(bool(bad)):
            raise UserError(
                f'the weights are not finite (epoch {runner.epoch + 1}), so they are not '
                f'saved: {", ".join(bad[:5]) or "those of another process"}'
                f'{f" and {len(bad) - 5} more" if len(bad) > 5 else ""}. The checkpoints that are '
                'there are not touched; lower the learning rate, clip the gradients '
                '(optim_wrapper.clip_grad), and resume.')
