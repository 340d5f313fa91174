# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Lets configs outside this repository inherit ours: `_base_ = 'mmdcnv4::folder/name.py'`.

mmengine looks for such files in `mmdcnv4/.mim`, which installing the package fills, but only for
packages that it knows; importing `mmdcnv4` makes it know this one. An editable installation has no
such folder; there the files are those of the repository.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

from mmengine.config import Config, utils

PACKAGE = 'mmdcnv4'
utils.MODULE2PACKAGE.setdefault(PACKAGE, PACKAGE)
_FOLDER = Path(__file__).parents[1]
_get_cfg_path = Config._get_cfg_path


def _find_config(cfg_path: str, filename: str) -> tuple[str, Optional[str]]:
    """Path and scope of an inherited config, as mmengine's function of this place gives them."""
    scope, _, name = cfg_path.partition('::')
    if scope == PACKAGE and not (_FOLDER / '.mim').exists():
        return str(_FOLDER.parent / 'configs' / name), scope
    return _get_cfg_path(cfg_path, filename)


Config._get_cfg_path = staticmethod(_find_config)


def forget_scope(node: Any) -> None:
    """Takes back the scope that mmengine gives to what it inherits from this package, in place.

    This package has no registry of its own, so that in its scope the types of mmdet or mmseg would
    not be found; without it they are looked up in the config's `default_scope`.

    Args:
        node: a config, or a part of it.
    """
    if isinstance(node, dict):
        if node.get('_scope_') == PACKAGE:
            del node['_scope_']
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for value in node:
            forget_scope(value)
