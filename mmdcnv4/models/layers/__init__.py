# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Layers that configs name by type, and blocks used by more than one model."""

from .conv_head import ConvHeadNeck
from .dcnv4_conv import DCNv4Conv2d
from .norm import ChannelLayerNorm
from .simple_fpn import SimpleFPN

__all__ = ['ChannelLayerNorm', 'ConvHeadNeck', 'DCNv4Conv2d', 'SimpleFPN']
