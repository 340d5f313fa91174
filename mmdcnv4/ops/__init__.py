# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""DCNv4 as a function and as a module. Needs torch alone, no OpenMMLab package.

Read in this order: `reference.py` (what is computed), `contract.py` (which inputs are legal),
`functional.py` (the public function), `module.py` (the layer with its projections).
"""

from . import _library  # noqa: F401  (connects autograd, shapes and autocast to the operator)
from .contract import offset_mask_channels, output_size
from .flash_deform_attn import FlashDeformAttn, flash_deform_attn
from .functional import Backend, dcnv4, get_backend, use_backend
from .module import DCNv4
from .multi_scale import (
    has_multi_scale_kernel,
    multi_scale_deformable_attention,
    multi_scale_deformable_attention_reference,
)
from .reference import dcnv4_reference

__all__ = [
    'DCNv4', 'Backend', 'FlashDeformAttn', 'dcnv4', 'dcnv4_reference', 'flash_deform_attn',
    'get_backend', 'has_multi_scale_kernel', 'multi_scale_deformable_attention',
    'multi_scale_deformable_attention_reference', 'offset_mask_channels', 'output_size',
    'use_backend'
]
