# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of MMEngine with torch >= 2.6, which reads weights only, and the newest whole one.

The few types that MMEngine stores beside weights are allow-listed, and nothing else.
"""

from __future__ import annotations

import importlib
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from mmengine.logging import HistoryBuffer

_HISTORY_METHODS = ('min', 'max', 'current', 'mean')


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
