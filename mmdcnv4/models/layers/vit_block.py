# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Layer of a vision transformer on a map, with DCNv4 or self-attention.

Source:   "An Image is Worth 16x16 Words", Dosovitskiy et al., ICLR 2021, arXiv:2010.11929; DCNv4
          in it: "Efficient Deformable ConvNets", Xiong et al., CVPR 2024, arXiv:2401.06197,
          table 8.
Names:    attributes are those of mmpretrain's VisionTransformer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Optional

from mmcv.cnn.bricks.transformer import FFN
from torch import Tensor, nn
from torch.nn import functional as F

from ...ops import DCNv4
from .backbone import recompute

EPS = 1e-6


class PatchEmbed(nn.Module):
    """Patches of the image: (N, c, H, W) -> (N, ceil(H / size), ceil(W / size), C).

    Rows and columns that are missing from the last patches are zeros.
    """

    def __init__(self, in_channels: int, channels: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.projection = nn.Conv2d(in_channels, channels, size, size)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the patches."""
        bottom, right = (-length % self.size for length in x.shape[2:])
        if bottom or right:
            x = F.pad(x, (0, right, 0, bottom))
        return self.projection(x).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Self-attention over all positions of a (N, H, W, C) map.

    Args:
        channels: width C.
        heads: divides it.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, H, W, C) to (N, H, W, C)."""
        # (N, L, 3, heads, width) -> (3, N, heads, L, width)
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(*qkv)  # (N, heads, L, width)
        return self.proj(out.transpose(1, 2).flatten(2)).view_as(x)


class ViTLayer(nn.Module):
    """Pre-norm layer: DCNv4 or attention, then the feed-forward network, each with a shortcut.

    Args:
        channels: width C.
        hidden: width of the feed-forward network.
        heads: of the attention; None for DCNv4.
        drop_path: probability with which a sample skips a branch.
        dcn: options of DCNv4.
        with_cp: recompute the layer in the backward pass.
    """

    def __init__(self, channels: int, hidden: int, heads: Optional[int], drop_path: float,
                 dcn: Mapping[str, Any], with_cp: bool) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.has_dcn = heads is None
        self.ln1 = nn.LayerNorm(channels, eps=EPS)
        if heads is None:
            self.dcn = DCNv4(channels, **dcn)
        else:
            self.attn = Attention(channels, heads)
        self.ln2 = nn.LayerNorm(channels, eps=EPS)
        dropout = dict(type='DropPath', drop_prob=drop_path)
        self.ffn = FFN(channels, hidden, act_cfg=dict(type='GELU'), dropout_layer=dropout)
        self.drop_path = self.ffn.dropout_layer  # has no state

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, H, W, C) to (N, H, W, C)."""
        if self.with_cp and x.requires_grad:
            return recompute(self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        mixed = self.ln1(x)
        x = x + self.drop_path(self.dcn(mixed) if self.has_dcn else self.attn(mixed))
        return self.ffn(self.ln2(x), identity=x)


def resize_positions(table: Tensor, height: int, width: int) -> Tensor:
    """Brings a position embedding (1, H, W, C) to another grid, bicubically."""
    if table.shape[1:3] == (height, width):
        return table
    resized = F.interpolate(table.permute(0, 3, 1, 2), (height, width), mode='bicubic',
                            align_corners=False)
    return resized.permute(0, 2, 3, 1)


