# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""DCNv4 and the backbones built on it, for OpenMMLab 2.x.

The operator needs torch alone: `from mmdcnv4 import dcnv4, DCNv4`.

`custom_imports = dict(imports=['mmdcnv4'], allow_failed_imports=False)` in a config makes
everything that `registration.py` lists available by its type name.
"""

from .ops import DCNv4, dcnv4, dcnv4_reference, use_backend
from .version import __version__

from . import registration  # isort: skip  # last: whatever it meets, the operator is there

__all__ = ['DCNv4', '__version__', 'dcnv4', 'dcnv4_reference', 'registration', 'use_backend']
