# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of MMEngine with torch >= 2.6, which reads weights only, and the newest whole one.

The few types that MMEngine stores beside weights are allow-listed, and nothing else.
"""

from __future__ import annotations

import importlib
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log

from ..errors import InvalidValue, MissingFile
from .config import is_local

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


def damage(file: Union[str, Path]) -> Optional[str]:
    """What is wrong with a checkpoint; None where it is whole.

    The check sums of all entries are compared, which torch does not do when it loads. A file of
    the format before torch 1.6 has none, and passes.
    """
    with open(file, 'rb') as stream:
        start = stream.read(4)
    if start != b'PK\x03\x04':
        return None if start[:1] == b'\x80' else 'it is not a checkpoint'
    if not zipfile.is_zipfile(file):
        return 'it is truncated; its end is missing'
    try:
        with zipfile.ZipFile(file) as archive:
            entry = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        return f'it is damaged ({error})'
    return None if entry is None else f'the entry {entry} is damaged: its check sum is another one'


def check_checkpoint(path: Optional[str], source: str) -> None:
    """Refuses a local file that is absent, was not written to its end, or is damaged.

    Args:
        path: of a checkpoint; None and addresses of other machines pass.
        source: where the path comes from, for the message.

    Raises:
        UserError: no such file, not the whole file, or a check sum that does not fit.
    """
    if path is None or not is_local(path):
        return
    file = os.path.expanduser(path)  # as mmengine's loader does
    if not os.path.isfile(file):
        raise MissingFile(f'{source}: the checkpoint {file} does not exist or is no file.')
    fault = damage(file)
    if fault is not None:
        raise InvalidValue(f'{source}: the checkpoint {file} cannot be used: {fault}.')


def find_resumable_checkpoint(work_dir: str) -> Optional[str]:
    """The checkpoint to continue from: the one named last if it is whole, else the newest whole.

    A process that is killed while it writes may leave a truncated file behind, and a file
    `last_checkpoint` that names one which has been deleted to make room. What is passed over is
    named in the log. What lies on no local disk, or is a folder of parts, is not looked into.
    """
    named = Path(work_dir) / 'last_checkpoint'
    last = named.read_text().strip() if named.is_file() else ''
    if last and (not is_local(last) or os.path.isdir(last)):
        return last
    candidates = [Path(last)] if last else []
    numbered = [(int(match[1]), file) for file in Path(work_dir).glob('*.pth')
                if (match := re.fullmatch(r'(?:epoch|iter)_(\d+)', file.stem))]
    candidates += [file for _, file in sorted(numbered, reverse=True)]
    damaged: dict[str, str] = {}
    for file in candidates:
        if not file.is_file() or str(file) in damaged:
            continue
        fault = damage(file)
        if fault is None:
            if damaged:
                _warn_of(damaged, f'Training goes on from {file}, which is older')
            return str(file)
        damaged[str(file)] = fault
    if damaged:
        _warn_of(damaged, f'{work_dir} holds no other checkpoint')
    return None


def _warn_of(damaged: dict[str, str], consequence: str) -> None:
    faults = '; '.join(f'{file}: {fault}' for file, fault in damaged.items())
    print_log(f'resume: DAMAGED CHECKPOINT, passed over: {faults}. {consequence}.',
              logger='current', level=logging.ERROR)
