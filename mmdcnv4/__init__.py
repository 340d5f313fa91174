# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""DCNv4 and the backbones built on it, for OpenMMLab 2.x.

`custom_imports = dict(imports=['mmdcnv4'], allow_failed_imports=False)` in a config makes
everything that `registration.py` lists available by its type name.
"""

from . import registration  # noqa: F401
from .version import __version__

__all__ = ['__version__']
