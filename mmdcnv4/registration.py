# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Imports every module that registers a class, as far as its packages are installed and work.

Task-neutral classes register in mmengine's root registries. mmcv uses those itself; mmdet, mmseg,
mmdet3d and mmpretrain fall back to them, so that a type name works there without a prefix.

`import mmdcnv4` does this, and so does `from mmdcnv4 import dcnv4`, which runs the same code.
Waiting until mmengine is there would depend on the order of imports: after `import mmdcnv4`, then
`import mmengine`, the `custom_imports` of a config finds the package imported and runs nothing of
it. The operator does not depend on the outcome: what fails is in `skipped`, and `python -m
mmdcnv4.info` shows it. Where no mm package is installed this costs nothing, elsewhere about as much
as `import mmcv`.
"""

from __future__ import annotations

import importlib
import importlib.util
import warnings

# module -> packages that it imports besides torch
_MODULES: dict[str, tuple[str, ...]] = {
    'mmdcnv4.registry': ('mmengine',),
    'mmdcnv4.models.layers': ('mmengine',),
    'mmdcnv4.models.losses': ('mmengine',),
    'mmdcnv4.models.backbones': ('mmengine', 'mmcv'),
    'mmdcnv4.models.replacement': ('mmengine',),
    'mmdcnv4.engine': ('mmengine',),
    'mmdcnv4.datasets.multi_scale': ('mmengine', 'numpy'),
}
# the same for what imports a task library, which takes seconds, or what not every installation
# has: only where a config names it
_ON_DEMAND: dict[str, tuple[str, ...]] = {
    'mmdcnv4.bevformer_v2': ('mmengine', 'mmcv', 'mmdet', 'mmdet3d'),
    # mmcv.ops, which mmcv-lite does not have
    'mmdcnv4.models.layers.multi_scale_attention': ('mmengine', 'mmcv'),
}

# module that was left out -> reason
skipped: dict[str, str] = {}


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def _missing(packages: tuple[str, ...]) -> str:
    """What to say of those that are not installed; empty when all are."""
    missing = [package for package in packages if not _is_installed(package)]
    return f'needs {", ".join(missing)}, not installed' if missing else ''


def _register(module: str, packages: tuple[str, ...]) -> None:
    skipped.pop(module, None)
    reason = _missing(packages)
    if reason:
        skipped[module] = reason
        return
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package raises anything
        skipped[module] = f'{type(error).__name__}: {error}'
        warnings.warn(f'mmdcnv4: the classes of {module} are not registered, its import failed '
                      f'with {skipped[module]}', RuntimeWarning, stacklevel=2)


def register_all(on_demand: bool = False) -> None:
    """Imports what can be imported, and notes in `skipped` what cannot and why.

    Args:
        on_demand: also what needs a task library.
    """
    with warnings.catch_warnings():
        # of setuptools, to the libraries that import it; nothing a user could do about it
        warnings.filterwarnings('ignore', message='pkg_resources is deprecated')
        for module, packages in {**_MODULES, **(_ON_DEMAND if on_demand else {})}.items():
            _register(module, packages)


def on_demand() -> dict[str, str]:
    """Modules that register their classes when a config names them -> how, or why they cannot."""
    return {module: _missing(packages) or
            f"custom_imports = dict(imports=['mmdcnv4', '{module}'], allow_failed_imports=False)"
            for module, packages in _ON_DEMAND.items()}


register_all()
