# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Random numbers that depend on the position in a run alone, so that a resumed run repeats them.

MMEngine stores no random state, nor could it store that of the workers of a data loader, which
are batches ahead. Here none has to be stored: every batch and every iteration begins with a state
that follows from the seed of the run, the process and the number of the batch.
"""

from __future__ import annotations

import random
from typing import Any, Optional

import numpy as np
import torch
from mmengine.dataset import DefaultSampler
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch.utils.data import get_worker_info

_DATA, _EPOCH, _ITERATION = range(3)  # first number of a key


def seed_by(*key: int) -> None:
    """Sets the random states of Python, NumPy and PyTorch (all devices) from some integers >= 0."""
    words = np.random.SeedSequence(key).generate_state(6)
    np.random.seed(words[:4])
    random.seed(words[2:].tobytes())
    torch.manual_seed(int(words[4]) << 31 ^ int(words[5]))


class SeededFetch:
    """Loads a batch with random states that follow from its number in the epoch.

    torch's loader calls an attribute `__getitems__` of a data set, if there is one, with the
    indices of a batch. This one counts the batches of its process: worker w of W loads the
    batches w, w + W, w + 2W and so on.

    Args:
        dataset: whose samples are loaded.
        seed: of the run.
        rank: of the process in a distributed run.
    """

    def __init__(self, dataset: Any, seed: int, rank: int) -> None:
        self.dataset = dataset
        self.inner = getattr(dataset, '__getitems__', None)
        self.seed, self.rank = seed, rank
        # shared with workers that live on through several epochs
        self.epoch = torch.zeros(1, dtype=torch.int64).share_memory_()
        self._counted_epoch = self._count = -1

    def __call__(self, indices: list) -> list:
        """The samples of a batch."""
        epoch = int(self.epoch)
        if epoch != self._counted_epoch:
            self._counted_epoch, self._count = epoch, -1
        self._count += 1
        worker = get_worker_info()
        number = (self._count if worker is None
                  else self._count * worker.num_workers + worker.id)
        seed_by(_DATA, self.seed, self.rank, epoch, number)
        return self.inner(indices) if self.inner is not None else [
            self.dataset[index] for index in indices]


@HOOKS.register_module()
class ResumableRandomnessHook(Hook):
    """Makes a resumed training draw the random numbers that the undisturbed one draws.

    Before every epoch and every iteration the states of Python, NumPy and PyTorch are set from
    the seed of the run and the number of the epoch or iteration; the samples of a batch from the
    number of the batch and the process, in a worker or not. With deterministic algorithms a run
    that is killed and resumed then ends with the same bits, and augmentations do not depend on
    the number of workers. The order of the data is that of the sampler, which follows from the
    seed and the epoch; MMEngine's iteration-based loop repeats it from the start.

    The tools of this package add it to every training; for other trainers:
    `custom_hooks = [dict(type='ResumableRandomnessHook')]`, and a fixed `randomness.seed`.

    Not covered is what a transform or model keeps between calls outside of the checkpoint (a
    cache of images for mosaic, gradients that were accumulated and not applied yet), and an epoch
    that was left in its middle: MMEngine begins it anew.
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._fetch: Optional[SeededFetch] = None

    def before_train(self, runner: Any) -> None:
        """Takes hold of the data set."""
        loop = runner.train_loop
        self._adopt_seed(runner, loop.dataloader)
        # an iteration-based loop has started its workers already, from the seed alone, and goes
        # through all batches again when it resumes
        if hasattr(loop, 'dataloader_iterator') and loop.dataloader.num_workers > 0:
            return
        dataset = loop.dataloader.dataset
        self._fetch = SeededFetch(dataset, runner.seed, get_rank())
        dataset.__getitems__ = self._fetch

    @staticmethod
    def _adopt_seed(runner: Any, loader: Any) -> None:
        """The seed of the checkpoint counts; the loader was built before it was read."""
        sampler = getattr(loader.batch_sampler, 'sampler', loader.sampler)
        seed = getattr(sampler, 'seed', None)
        if not runner._resume or seed is None or seed == runner.seed or \
                runner._randomness_cfg.get('diff_rank_seed'):
            return
        if type(sampler) is DefaultSampler:
            sampler.seed = runner.seed
        else:
            runner.logger.warning(
                f'the run that is resumed has the seed {runner.seed}, the order of the data was '
                f'made with {seed}: it is another one than without the interruption. Set '
                f'randomness.seed={runner.seed} to repeat it.')

    def before_train_epoch(self, runner: Any) -> None:
        """Sets the states with which an epoch begins."""
        if self._fetch is not None:
            self._fetch.epoch.fill_(runner.epoch)
        seed_by(_EPOCH, runner.seed, runner.epoch)

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Sets the states with which the model sees a batch."""
        seed_by(_ITERATION, runner.seed, runner.iter)
