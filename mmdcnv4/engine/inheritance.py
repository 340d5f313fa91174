# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Lets configs outside this repository inherit ours: `_base_ = 'mmdcnv4::folder/name.py'`.

mmengine looks for such files in `mmdcnv4/.mim`, which installing the package fills, but only for
packages that it knows; importing `mmdcnv4` makes it know this one.
"""

from __future__ import annotations

from typing import Any

from mmengine.config import utils

PACKAGE = 'mmdcnv4'
utils.MODULE2PACKAGE.setdefault(PACKAGE, PACKAGE)


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
