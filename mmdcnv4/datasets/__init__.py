# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Data sets that the host libraries lack."""

from .drawn_scenes import CLASSES, PALETTE, write_drawn_scenes

__all__ = ['CLASSES', 'PALETTE', 'write_drawn_scenes']
