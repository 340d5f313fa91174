# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Imports every module that registers a class, as far as its packages are installed.

Task-neutral classes register in mmengine's root registries. mmcv uses those itself; mmdet, mmseg,
mmdet3d and mmpretrain fall back to them, so that a type name works there without a prefix.
"""

from __future__ import annotations

import importlib
import importlib.util

# module -> packages that it imports besides torch
_MODULES = {
    'mmdcnv4.models.layers': ('mmengine', 'mmcv'),
    'mmdcnv4.models.backbones': ('mmengine', 'mmcv'),
    'mmdcnv4.engine': ('mmengine',),
    'mmdcnv4.datasets.multi_scale': ('mmengine', 'numpy'),
}

# module that was left out -> reason
skipped: dict[str, str] = {}


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def register_all() -> None:
    """Imports what can be imported, and notes in `skipped` what cannot and why."""
    for module, packages in _MODULES.items():
        missing = [package for package in packages if not _is_installed(package)]
        if missing:
            skipped[module] = f'needs {", ".join(missing)}, not installed'
            continue
        importlib.import_module(module)


register_all()
