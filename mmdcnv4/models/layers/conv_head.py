# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What stands between the last feature map and the linear layer of the published classifiers.

Source:   the ImageNet-1K checkpoints of "Efficient Deformable ConvNets", arXiv:2401.06197, and of
          "InternImage", arXiv:2211.05778.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

from mmengine.registry import MODELS
from torch import Tensor, nn


@MODELS.register_module()
class ConvHeadNeck(nn.Module):
    """1x1 convolution, batch norm, GELU and mean over the map: `neck` of a mmpretrain classifier.

    The parameters stand below `conv_head`, as in the published files; the linear layer after it
    is mmpretrain's `LinearClsHead`. `tools/model_converters/convert_checkpoint.py
    classifier` renames such a file.

    Args:
        in_channels: width of the last feature map.
        out_channels: width of the result; the published classifiers have 1.5 times `in_channels`.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv_head = nn.Sequential(
            nn.Conv2d(in_channels, out_channels, 1, bias=False),
            nn.Sequential(nn.BatchNorm2d(out_channels)),  # inside: keys end in `1.0.weight`
            nn.GELU())
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, feats: Union[Tensor, Sequence[Tensor]]) -> tuple[Tensor]:
        """Maps the last of the feature maps (N, in_channels, H, W) to one (N, out_channels)."""
        x = feats if isinstance(feats, Tensor) else feats[-1]
        return (self.pool(self.conv_head(x)).flatten(1),)
