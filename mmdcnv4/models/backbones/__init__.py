# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Backbones, registered once in mmengine's root registry for all task libraries."""

from .dat import DAT
from .dynamic_mobile_former import DynamicMobileFormer
from .flash_intern_image import FlashInternImage, InternImage

__all__ = ['DAT', 'DynamicMobileFormer', 'FlashInternImage', 'InternImage']
