# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Parts of ConvNeXt on (N, H, W, C) maps, with DCNv4 or a depthwise convolution in the block.

Source:   "A ConvNet for the 2020s", Liu et al., CVPR 2022, arXiv:2201.03545, section 2; DCNv4 in
          it, and the softmax over the weights of the convolution: "Efficient Deformable ConvNets",
          Xiong et al., CVPR 2024, arXiv:2401.06197, tables 1 and 8.
Names:    attributes are those of mmpretrain's ConvNeXt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional, Union

import torch
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops import DCNv4
from .backbone import recompute
from .local_attention import pad_at_least

CORE_OPS = ('DCNv4', 'DWConv', 'SoftmaxDWConv')
EPS = 1e-6


@dataclass(frozen=True)
class BlockOptions:
    """What the blocks of a stage have in common; names and meaning as in ConvNeXtDCNv4."""

    core_op: str
    group_channels: int
    kernel_size: int
    dw_kernel_size: Optional[int]
    offset_scale: float
    with_pointwise: bool
    remove_center: bool
    mask_init: Union[float, str]
    layer_scale: Optional[float]
    with_cp: bool


class DepthwiseConv(nn.Conv2d):
    """The 7x7 depthwise convolution of ConvNeXt: (N, H, W, C) -> (N, H, W, C).

    Args:
        channels: width C.
        softmax: normalise the 49 weights of each channel by a softmax, as DCNv3 does with its
            masks: the experiment of table 1 of the DCNv4 paper.
    """

    def __init__(self, channels: int, softmax: bool) -> None:
        super().__init__(channels, channels, 7, padding=3, groups=channels)
        self.softmax = softmax

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, H, W, C) to (N, H, W, C)."""
        weight = self.weight
        if self.softmax:
            weight = weight.flatten(2).softmax(-1).view_as(weight)
        x = x.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W) -> back
        return F.conv2d(x, weight, self.bias, padding=3, groups=self.groups).permute(0, 2, 3, 1)


class Patches(nn.Sequential):
    """A convolution without overlap and a norm: the stem, 0 and 1 in the state dict.

    (N, c, H, W) -> (N, max(H // 4, 1), max(W // 4, 1), C); a smaller image is padded with zeros.
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(nn.Conv2d(in_channels, channels, 4, 4), nn.LayerNorm(channels, eps=EPS))

    def forward(self, x: Tensor) -> Tensor:
        """Computes the patches."""
        conv, norm = self
        return norm(conv(pad_at_least(x, 4)).permute(0, 2, 3, 1))


class Downsample(nn.Sequential):
    """A norm and a 2x2 convolution of stride 2: (N, H, W, c) -> (N, max(H // 2, 1), ..., C)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(nn.LayerNorm(in_channels, eps=EPS), nn.Conv2d(in_channels, channels, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        """Halves the map; one of a single row is padded with zeros."""
        norm, conv = self
        return conv(pad_at_least(norm(x).permute(0, 3, 1, 2), 2)).permute(0, 2, 3, 1)


class ConvNeXtBlock(nn.Module):
    """Mixes positions, then channels, in one residual branch.

    Args:
        channels: width c.
        drop_path: probability with which a sample skips the branch.
        options: of the backbone.
    """

    def __init__(self, channels: int, drop_path: float, options: BlockOptions) -> None:
        super().__init__()
        self.with_cp = options.with_cp
        self.has_dcn = options.core_op == 'DCNv4'
        if self.has_dcn:
            # a depthwise convolution has no projections, so by default there are none here
            self.dcn = DCNv4(
                channels, options.kernel_size, pad=options.kernel_size // 2,
                group=channels // options.group_channels, offset_scale=options.offset_scale,
                dw_kernel_size=options.dw_kernel_size, remove_center=options.remove_center,
                without_pointwise=not options.with_pointwise, mask_init=options.mask_init)
        else:
            self.depthwise_conv = DepthwiseConv(channels, options.core_op == 'SoftmaxDWConv')
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.pointwise_conv1 = nn.Linear(channels, 4 * channels)
        self.act = nn.GELU()
        self.pointwise_conv2 = nn.Linear(4 * channels, channels)
        self.gamma = (None if options.layer_scale is None else
                      nn.Parameter(torch.full((channels,), float(options.layer_scale))))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, H, W, c) to (N, H, W, c)."""
        if self.with_cp and x.requires_grad:
            return recompute(self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        mixed = self.norm(self.dcn(x) if self.has_dcn else self.depthwise_conv(x))
        mixed = self.pointwise_conv2(self.act(self.pointwise_conv1(mixed)))
        if self.gamma is not None:
            mixed = mixed * self.gamma
        return x + self.drop_path(mixed)
