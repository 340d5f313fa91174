# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A feature pyramid of one map, for backbones that keep one resolution.

Source:   "Exploring Plain Vision Transformer Backbones for Object Detection", Li et al.,
          ECCV 2022, arXiv:2203.16527, section 3 and appendix.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn import functional as F

from .norm import ChannelLayerNorm

_EPS = 1e-6


def _lateral(in_channels: int, out_channels: int) -> nn.Sequential:
    """A 1x1 and a 3x3 convolution, each with a norm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, bias=False),
        ChannelLayerNorm(out_channels, eps=_EPS),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        ChannelLayerNorm(out_channels, eps=_EPS))


@MODELS.register_module()
class SimpleFPN(BaseModule):
    """Maps of strides 4, 8, 16 and 32 from one of stride 16, without connections between them.

    Two transposed convolutions, one, none, and a max-pooling; then for each map a 1x1 and a 3x3
    convolution with norms over the channels. Levels beyond four are strided copies of the last.

    Args:
        in_channels: width C of the map; a multiple of 4.
        out_channels: width of the results.
        num_outs: number of results, at least 4.
        init_cfg: of mmengine.

    Raises:
        ValueError: the message names the argument, the rule and the value.
    """

    def __init__(self, in_channels: int, out_channels: int = 256, num_outs: int = 5,
                 init_cfg: Union[dict, list, None] = None) -> None:
        super().__init__(init_cfg)
        if in_channels % 4 or in_channels < 4:
            raise ValueError(f'SimpleFPN: in_channels must be a multiple of 4, got {in_channels}')
        if num_outs < 4:
            raise ValueError(f'SimpleFPN: num_outs must be >= 4, got {num_outs}')
        self.in_channels, self.num_outs = in_channels, num_outs
        half, quarter = in_channels // 2, in_channels // 4
        self.up4 = nn.Sequential(
            nn.ConvTranspose2d(in_channels, half, 2, 2), ChannelLayerNorm(half, eps=_EPS),
            nn.GELU(), nn.ConvTranspose2d(half, quarter, 2, 2))
        self.up8 = nn.ConvTranspose2d(in_channels, half, 2, 2)
        self.laterals = nn.ModuleList(
            _lateral(width, out_channels) for width in (quarter, half, in_channels, in_channels))

    def forward(self, inputs: Union[Tensor, Sequence[Tensor]]) -> tuple[Tensor, ...]:
        """Computes the pyramid.

        Args:
            inputs: a map (N, C, H, W), or a sequence of which the last is used.

        Returns:
            `num_outs` maps (N, out_channels, ...) of 4 H, 2 H, H, ceil(H / 2), ... rows.

        Raises:
            ValueError: the map has another width.
        """
        x = inputs if isinstance(inputs, Tensor) else inputs[-1]
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f'SimpleFPN: the map must have shape (N, {self.in_channels}, H, W), '
                             f'got {tuple(x.shape)}')
        maps = (self.up4(x), self.up8(x), x, F.max_pool2d(x, 2, 2, ceil_mode=True))
        outs = [lateral(level) for lateral, level in zip(self.laterals, maps)]
        while len(outs) < self.num_outs:
            outs.append(F.max_pool2d(outs[-1], 1, 2))
        return tuple(outs)
