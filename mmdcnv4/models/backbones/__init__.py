# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Backbones, registered once in mmengine's root registry for all task libraries."""

from .convnext_dcnv4 import ConvNeXtDCNv4
from .dat import DAT
from .dynamic_mobile_former import DynamicMobileFormer
from .flash_intern_image import FlashInternImage, InternImage
from .vit_dcnv4 import ViTDCNv4

__all__ = ['ConvNeXtDCNv4', 'DAT', 'DynamicMobileFormer', 'FlashInternImage', 'InternImage',
           'ViTDCNv4']
