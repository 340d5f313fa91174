# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Loads the compiled kernels, or remembers why there are none."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, Optional

import torch

from . import proven


def _answer_nothing(*arguments: Any) -> Any:
    """What :data:`call_dcnv4` is without compiled kernels."""
    return NotImplemented


# The short way into the compiled operator, with the arguments of its schema. Where an argument or a
# mode in force is out of the ordinary it does nothing and returns NotImplemented; see
# `csrc/python_module.cpp`.
call_dcnv4: Callable[..., Any] = _answer_nothing


def _shadowed() -> Optional[str]:
    """What to say where a folder of sources hides an installed package that has kernels."""
    here = Path(__file__).resolve().parents[1]
    try:
        files = metadata.distribution('mmdcnv4').files or ()
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        library = Path(str(file.locate())).resolve()
        if library.name.startswith('_C.') and library.parent != here and library.exists():
            return (f'Python imports the sources in {here}, which hide the installed package in '
                    f'{library.parent}: start Python in another folder, or install with '
                    '`pip install --no-build-isolation --editable .`')
    return None


def _load() -> Optional[str]:
    """Imports `mmdcnv4._C`; returns None, or the reason why it is not usable."""
    global call_dcnv4
    try:
        module = importlib.import_module('mmdcnv4._C')
    except ModuleNotFoundError as error:
        if error.name != 'mmdcnv4._C':
            raise
        return _shadowed() or (
            'the package was installed without compiled kernels (while it was built there was '
            'no C++ compiler or no torch, or MMDCNV4_NATIVE=0 was set)')
    except ImportError as error:
        return (f'the compiled kernels do not load with torch {torch.__version__}: {error}. '
                'They work only with the torch they were built against')
    if not hasattr(module, 'dcnv4'):  # it would have no gradient either
        return 'the compiled kernels are older than the Python files next to them'
    call_dcnv4 = module.dcnv4
    return None


missing_reason: Optional[str] = _load()
is_available: bool = missing_reason is None


def _read_build_info() -> dict[str, Any]:
    """What was compiled, per device; the keys are the devices that have kernels."""
    if not is_available:
        return {}
    info = {'cpu': json.loads(torch.ops.mmdcnv4._cpu_info())}
    if hasattr(torch.ops.mmdcnv4, '_cuda_info'):
        info['cuda'] = json.loads(torch.ops.mmdcnv4._cuda_info())
    return info


build_info: dict[str, Any] = _read_build_info()
if 'cuda' in build_info:
    proven.apply(build_info['cuda']['kernels'])
_warned: set[str] = set()


def warn_once(reason: str) -> None:
    """Says once per process and reason that the PyTorch path is taken, and how to fix it."""
    if reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f'mmdcnv4: the compiled kernels are not used: {reason}; the much slower PyTorch path '
            'is taken. `python -m mmdcnv4.info` tells what was built; '
            '`pip install --no-build-isolation --editable .` in a clone builds it anew.',
            RuntimeWarning, stacklevel=5)
