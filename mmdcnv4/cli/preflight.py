# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What can be found wrong with the arguments of a program before it runs.

A check raises a `UserError`, whose message is all that the user needs: what is wrong, where, and
what to do. The checks of what a config names are in :mod:`mmdcnv4.checks`.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Iterable
from typing import Optional

import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader

from ..checks.checkpoints import damage
from ..checks.config import is_local, type_name, walk
from ..checks.weights import Shapes
from ..errors import InvalidValue

PICTURE_ENDINGS = ('.png', '.jpg', '.jpeg', '.pdf', '.svg')  # that matplotlib writes


def check_folder(folder: str, option: str) -> None:
    """Creates `folder` and writes a file into it.

    Args:
        folder: where results go.
        option: of the command line, which names it.

    Raises:
        UserError: one of the two is not possible.
    """
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix='.write-test-'):
            pass
    except OSError as error:
        raise InvalidValue(f'cannot write to the folder {folder}: {error.strerror}. '
                        f'Choose another one with {option}.') from error


def check_file(file: str, option: str, endings: Iterable[str]) -> None:
    """Refuses a file to write that has a wrong ending, is a folder, or lies where none can be.

    Raises:
        UserError: names the option.
    """
    if not file.lower().endswith(tuple(endings)):
        raise InvalidValue(f'{option} must end in {", ".join(endings)}, got {file}')
    if os.path.isdir(file):
        raise InvalidValue(f'{option} must be a file, got the folder {file}')
    check_folder(os.path.dirname(file) or '.', option)


def read_shapes(path: str) -> Shapes:
    """Name and shape of the weights in a checkpoint, the prefix `module.` taken off.

    Args:
        path: as mmengine's loader takes it.

    Raises:
        UserError: the file holds something else.
    """
    try:
        content = CheckpointLoader.load_checkpoint(path, map_location='cpu')
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        if is_local(path) and damage(os.path.expanduser(path)) is not None:
            raise InvalidValue(f'{path} is not a checkpoint.') from error
        if isinstance(error, pickle.UnpicklingError):
            raise InvalidValue(
                f'the checkpoint {path} holds objects that are neither weights nor what MMEngine '
                'saves. It could run code, so it is refused.') from error
        raise
    weights = content.get('state_dict', content) if isinstance(content, dict) else content
    if not isinstance(weights, dict):
        raise InvalidValue(f'the checkpoint {path} must hold a dict of weights, got a '
                        f'{type(weights).__name__}.')
    return Shapes.of(content)


def check_device(name: str) -> None:
    """Refuses a device that PyTorch does not know, or a GPU that it does not see.

    Raises:
        UserError: names the device.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InvalidValue(f'--device must be cpu, cuda or cuda:<number>, got {name}') from error
    if device.type == 'cuda' and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidValue(f'--device {name}: torch {torch.__version__} sees '
                        f'{torch.cuda.device_count()} GPU(s).')


def _is_ours(name: str) -> bool:
    """Whether a class of this package has this name in the root registry."""
    kind = MODELS.module_dict.get(name)
    return str(getattr(kind, '__module__', '')).split('.')[0] == __name__.split('.')[0]


def missing_import(cfg: Config) -> Optional[str]:
    """A hint when the config uses a class of this package without importing the package."""
    imports = (cfg.get('custom_imports') or {}).get('imports') or []
    imports = [imports] if isinstance(imports, str) else imports
    if any(name.split('.')[0] == 'mmdcnv4' for name in imports):
        return None
    used = sorted({type_name(node) for _, node in walk(cfg.get('model', {}), 'model')
                   if isinstance(node.get('type'), str) and _is_ours(type_name(node))})
    if not used:
        return None
    return (f'the config uses {", ".join(used)} but does not import mmdcnv4. The tools of this '
            'package do that themselves; all other programs need the line\n'
            "    custom_imports = dict(imports=['mmdcnv4'], allow_failed_imports=False)")
