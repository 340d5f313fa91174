# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Parts of Dynamic Mobile-Former: stem, token layers, dynamic bottleneck, FFN, block.

Source:   Dynamic Mobile-Former (DMF). GRN: "ConvNeXt V2", Woo et al., CVPR 2023,
          arXiv:2301.00808, section 3.
Names:    attributes are those of the released state dicts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import recompute
from .dynamic_conv import DynamicConv2d

GRN_MODES = ('channel', 'legacy')


@dataclass(frozen=True)
class MobileFormerOptions:
    """What all blocks of a backbone have in common; meaning as in DynamicMobileFormer."""

    groups: int
    ffn_ratio: float
    token_channels: int
    former_heads: int
    num_kernels: int
    grn_mode: str
    norm_cfg: dict[str, Any]
    with_cp: bool

    def norm(self, channels: int) -> nn.Module:
        """A norm of the type that the caller chose."""
        return build_norm_layer(self.norm_cfg, channels)[1]

    def dynamic_conv(self, in_channels: int, out_channels: int, kernel_size: int = 1,
                     groups: int = 1) -> DynamicConv2d:
        """A convolution that is steered by the first token."""
        return DynamicConv2d(in_channels, out_channels, kernel_size, groups,
                             token_channels=self.token_channels, num_kernels=self.num_kernels,
                             norm_cfg=self.norm_cfg)


class Stem(nn.Module):
    """3x3 convolution of stride 2, norm, GELU: (N, 3, H, W) -> (N, C, H/2, W/2)."""

    def __init__(self, in_channels: int, channels: int, options: MobileFormerOptions) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, 3, stride=2, padding=1)
        self.bn = options.norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps an image (N, 3, H, W) to (N, C, ceil(H / 2), ceil(W / 2))."""
        return F.gelu(self.bn(self.conv(x)))


class LiteBottleneck(nn.Module):
    """1x1, depthwise 3x3 and 1x1 convolution, each with a norm; no residual."""

    def __init__(self, in_channels: int, hidden: int, out_channels: int,
                 options: MobileFormerOptions) -> None:
        super().__init__()
        self.pw_conv1 = nn.Conv2d(in_channels, hidden, 1, bias=False)
        self.bn1 = options.norm(hidden)
        self.dw_conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.bn2 = options.norm(hidden)
        self.pw_conv2 = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.bn3 = options.norm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, in, H, W) to (N, out, H, W)."""
        x = F.gelu(self.bn1(self.pw_conv1(x)))
        x = F.gelu(self.bn2(self.dw_conv(x)))
        return self.bn3(self.pw_conv2(x))


class LightCrossAttention(nn.Module):
    """Tokens read the map, whose pixels are keys and values as they are, without a projection.

    The residual adds the *normalised* tokens, as in the released code.

    Args:
        channels: width C of the map.
        token_channels: width D of the tokens.
        heads: divides C.
        drop_path: probability with which a sample skips the branch.
    """

    def __init__(self, channels: int, token_channels: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(token_channels)
        self.q = nn.Linear(token_channels, channels, bias=False)
        self.fc = nn.Linear(channels, token_channels, bias=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Maps (N, C, H, W) and tokens (N, T, D) to tokens (N, T, D)."""
        tokens = self.norm(tokens)
        query = self.q(tokens).unflatten(2, (self.heads, -1)).transpose(1, 2)
        # (N, C, H, W) -> (N, heads, C / heads, H * W) -> (N, heads, H * W, C / heads)
        pixels = x.flatten(2).unflatten(1, (self.heads, -1)).transpose(2, 3)
        read = F.scaled_dot_product_attention(query, pixels, pixels)
        return tokens + self.drop_path(self.fc(read.transpose(1, 2).flatten(2)))


class TokenAttention(nn.Module):
    """Self-attention among the tokens of a sample: (N, T, D) -> (N, T, D)."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj = nn.Linear(channels, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (N, T, D) to (N, T, D)."""
        # (N, T, 3D) -> (3, N, heads, T, D / heads)
        qkv = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*qkv.unbind())
        return self.proj(mixed.transpose(1, 2).flatten(2))


class TokenMLP(nn.Module):
    """Two linear layers per token, twice as wide in between."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, 2 * channels, bias=False)
        self.fc2 = nn.Linear(2 * channels, channels, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (N, T, D) to (N, T, D)."""
        return self.fc2(F.gelu(self.fc1(tokens)))


class Former(nn.Module):
    """A transformer layer over the tokens.

    Args:
        channels: width D.
        heads: divides D.
        drop_path: probability with which a sample skips a branch.
    """

    def __init__(self, channels: int, heads: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(channels)
        self.token_attention = TokenAttention(channels, heads)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = TokenMLP(channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        """Maps (N, T, D) to (N, T, D)."""
        tokens = tokens + self.drop_path(self.token_attention(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))


class GlobalResponseNorm(nn.Module):
    """Strengthens the channels whose norm over the map is large compared with those of the others.

    ::

        y = gamma * x * G / (mean(G) + eps) + beta + x,    G[n, c] = norm of x[n, c] over the map

    Args:
        channels: C.
        mode: 'channel' takes the mean over the channels, which is the definition; 'legacy' over an
            axis of length one, as the released code of DMF: y = (1 + gamma) * x + beta, nearly.
        eps: added to the mean.
    """

    def __init__(self, channels: int, mode: str, eps: float = 1e-6) -> None:
        super().__init__()
        self.axis = 1 if mode == 'channel' else -1
        self.eps = eps
        self.gamma = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H, W)."""
        # sums of squares leave the range of half precision
        dtype = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True, dtype=dtype)
        factor = norm / (norm.mean(self.axis, keepdim=True) + self.eps)
        return x * (1 + self.gamma * factor).to(x.dtype) + self.beta.to(x.dtype)


class IRFFN(nn.Module):
    """Inverted residual feed-forward network: 1x1, depthwise 3x3 in a shortcut, GRN, 1x1."""

    def __init__(self, channels: int, options: MobileFormerOptions) -> None:
        super().__init__()
        hidden = int(channels * options.ffn_ratio)
        self.pw_conv1 = nn.Conv2d(channels, hidden, 1, bias=False)
        self.bn1 = options.norm(hidden)
        self.dw_conv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False)
        self.grn = GlobalResponseNorm(hidden, options.grn_mode)
        self.pw_conv2 = nn.Conv2d(hidden, channels, 1, bias=False)
        self.bn3 = options.norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H, W)."""
        x = F.gelu(self.bn1(self.pw_conv1(x)))
        x = F.gelu(self.grn(x + self.dw_conv(x)))
        return self.bn3(self.pw_conv2(x))


class DynamicMobile(nn.Module):
    """Bottleneck of three dynamic convolutions; no residual.

    Args:
        in_channels, hidden, out_channels: widths.
        stride: 2 halves the map first, by a depthwise 3x3 convolution.
        options: of the backbone.
    """

    def __init__(self, in_channels: int, hidden: int, out_channels: int, stride: int,
                 options: MobileFormerOptions) -> None:
        super().__init__()
        self.downsample = nn.Sequential(
            nn.Conv2d(in_channels, in_channels, 3, stride=2, padding=1, groups=in_channels),
            options.norm(in_channels), nn.GELU()) if stride == 2 else None
        self.pw_conv1 = options.dynamic_conv(in_channels, hidden, groups=options.groups)
        self.bn1 = options.norm(hidden)
        self.dw_conv = options.dynamic_conv(hidden, hidden, 3, groups=hidden)
        self.bn2 = options.norm(hidden)
        self.pw_conv2 = options.dynamic_conv(hidden, out_channels, groups=options.groups)
        self.bn3 = options.norm(out_channels)

    def forward(self, x: Tensor, token: Tensor) -> Tensor:
        """Maps (N, in, H, W) and a token (N, D) to (N, out, H / stride, W / stride)."""
        if self.downsample is not None:
            x = self.downsample(x)
        x = F.gelu(self.bn1(self.pw_conv1(x, token)))
        x = F.gelu(self.bn2(self.dw_conv(x, token)))
        return self.bn3(self.pw_conv2(x, token))


class MobileFormerBlock(nn.Module):
    """Tokens read the map and mix; the first of them then steers the convolutions of the map.

    Args:
        in_channels, hidden, out_channels: widths of the map before, inside and after.
        stride: 1 or 2.
        heads: of the cross-attention; divides `in_channels`.
        drop_path: probability with which a sample skips a residual branch.
        options: of the backbone.
    """

    def __init__(self, in_channels: int, hidden: int, out_channels: int, stride: int, heads: int,
                 drop_path: float, options: MobileFormerOptions) -> None:
        super().__init__()
        self.with_cp = options.with_cp
        self.mobile2former = LightCrossAttention(in_channels, options.token_channels, heads,
                                                 drop_path)
        self.former = Former(options.token_channels, options.former_heads, drop_path)
        self.dynamic_mobile = DynamicMobile(in_channels, hidden, out_channels, stride, options)
        self.norm = nn.GroupNorm(1, out_channels)
        self.ffn = IRFFN(out_channels, options)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Maps (N, in, H, W) and tokens (N, T, D) to (N, out, ...) and tokens (N, T, D)."""
        if self.with_cp and x.requires_grad:
            return recompute(self._forward, x, tokens, norms_of=self)
        return self._forward(x, tokens)

    def _forward(self, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.former(self.mobile2former(x, tokens))
        x = self.dynamic_mobile(x, tokens[:, 0])
        return x + self.drop_path(self.ffn(self.norm(x))), tokens
