# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the programs do with checkpoints; the checks are in :mod:`mmdcnv4.checks.checkpoints`."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch
from mmengine.config import Config

from ..checks.checkpoints import allow_mmengine_checkpoints, damage, find_resumable_checkpoint
from ..checks.config import is_local

__all__ = ['adopt_saved_seed', 'allow_mmengine_checkpoints', 'damage', 'find_resumable_checkpoint']


def adopt_saved_seed(cfg: Config) -> None:
    """Gives a run that is resumed the seed of the checkpoint, where the config names none.

    MMEngine reads it too, but has made the order of the data by then.
    """
    file = cfg.get('load_from')
    randomness = dict(cfg.get('randomness') or {})
    if not cfg.get('resume') or not file or not is_local(file) or \
            randomness.get('seed') is not None:
        return
    file = str(Path(file).expanduser())
    content = torch.load(file, map_location='cpu', weights_only=True,
                         mmap=zipfile.is_zipfile(file) or None)
    seed = (content.get('meta') or {}).get('seed') if isinstance(content, dict) else None
    if seed is not None:
        cfg.randomness = dict(randomness, seed=seed)
