# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Parts of DAT, DAT+ and DAT++: stems, downsampling, feed-forward networks, stages.

Source:   "DAT++: Spatially Dynamic Vision Transformer with Deformable Attention", Xia et al.,
          arXiv:2309.01430, section 3; "Vision Transformer with Deformable Attention", Xia et al.,
          CVPR 2022, arXiv:2201.00520.
Names:    attributes are those of the published state dicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import torch
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import recompute
from .deformable_attention import DeformableAttention, DeformableOptions
from .local_attention import NeighborhoodAttention, WindowAttention, pad_at_least
from .norm import map_norm

# D deformable, N neighbourhood, L window, S shifted window, P spatial reduction, X ConvNeXt block
LETTERS = 'DNLSPX'


@dataclass(frozen=True)
class StageOptions:
    """What the blocks of a stage have in common.

    Attributes:
        heads, groups: of the attention; groups of offsets.
        stride, offset_kernel: pixels per key of D and P; kernel of the offset network.
        kernel_size, window_size: of N; of L and S.
        size: (height, width) of the map for which tables are made.
        mlp_ratio: hidden width of the feed-forward network over its width.
        use_dwc_mlp, use_lpu: a depthwise convolution in the feed-forward network; one before it.
        layer_scale: initial value of a factor per channel on every branch; None for none.
        deformable: options of D.
        with_cp: compute blocks again in the backward pass.
    """

    heads: int
    groups: int
    stride: int
    offset_kernel: int
    kernel_size: int
    window_size: int
    size: tuple[int, int]
    mlp_ratio: float
    use_dwc_mlp: bool
    use_lpu: bool
    layer_scale: Optional[float]
    deformable: DeformableOptions
    with_cp: bool


class PatchEmbedding(nn.Sequential):
    """The image in patches of 4 x 4: (N, 3, H, W) -> (N, C, max(H // 4, 1), max(W // 4, 1))."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(nn.Conv2d(in_channels, channels, 4, 4), map_norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Computes the patches; an image smaller than one is padded with zeros."""
        return super().forward(pad_at_least(x, 4))


class PatchMerging(nn.Sequential):
    """Halves the map by patches of 2 x 2: (N, c, H, W) -> (N, c', max(H // 2, 1), ...)."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(nn.Conv2d(in_channels, channels, 2, 2, bias=False), map_norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Computes the patches; a map smaller than one is padded with zeros."""
        return super().forward(pad_at_least(x, 2))


def conv_stem(in_channels: int, channels: int) -> nn.Sequential:
    """Two 3x3 convolutions of stride 2: (N, 3, H, W) -> (N, C, ceil(H / 4), ceil(W / 4))."""
    half = channels // 2
    return nn.Sequential(
        nn.Conv2d(in_channels, half, 3, 2, 1), map_norm(half), nn.GELU(),
        nn.Conv2d(half, channels, 3, 2, 1), map_norm(channels))


def conv_downsample(in_channels: int, channels: int) -> nn.Sequential:
    """A 3x3 convolution of stride 2: (N, c, H, W) -> (N, c', ceil(H / 2), ceil(W / 2))."""
    return nn.Sequential(nn.Conv2d(in_channels, channels, 3, 2, 1, bias=False),
                         map_norm(channels))


class MLP(nn.Module):
    """Two linear layers per pixel of a (N, C, H, W) map."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.chunk = nn.Sequential()
        self.chunk.add_module('linear1', nn.Linear(channels, hidden))
        self.chunk.add_module('act', nn.GELU())
        self.chunk.add_module('linear2', nn.Linear(hidden, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H, W)."""
        return self.chunk(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvFFN(nn.Module):
    """Two 1x1 convolutions, and between them a depthwise 3x3 one that is added, then GELU."""

    def __init__(self, channels: int, ratio: float) -> None:
        super().__init__()
        hidden = int(channels * ratio)
        self.linear1 = nn.Sequential(nn.Conv2d(channels, hidden, 1))
        self.dwc = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.linear2 = nn.Sequential(nn.Conv2d(hidden, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H, W)."""
        x = self.linear1(x)
        return self.linear2(F.gelu(x + self.dwc(x)))


class LayerScale(nn.Module):
    """A learned factor per channel of a (N, C, H, W) map."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.value = value
        self.gamma = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initial value."""
        nn.init.constant_(self.gamma, self.value)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H, W)."""
        return x * self.gamma[:, None, None]


class SpatialReductionAttention(nn.Module):
    """Attention of every pixel to the map reduced by a strided convolution.

    Source: "Pyramid Vision Transformer", Wang et al., ICCV 2021, arXiv:2102.12122, section 3.3.

    Args:
        channels: width C.
        heads: divides C.
        stride: pixels per key.
    """

    def __init__(self, channels: int, heads: int, stride: int) -> None:
        super().__init__()
        self.heads, self.stride = heads, stride
        self.q = nn.Conv2d(channels, channels, 1)
        self.kv = nn.Conv2d(channels, 2 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)
        self.sr = nn.Identity() if stride == 1 else nn.Sequential(
            nn.Conv2d(channels, channels, stride, stride), map_norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H, W)."""
        split = (self.heads, -1)
        q = self.q(x).flatten(2).unflatten(1, split).transpose(2, 3)
        kv = self.kv(self.sr(pad_at_least(x, self.stride)))
        k, v = (part.flatten(2).unflatten(1, split).transpose(2, 3) for part in kv.chunk(2, 1))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:]))


def make_attention(letter: str, channels: int, options: StageOptions) -> nn.Module:
    """The layer that a letter stands for."""
    if letter == 'D':
        return DeformableAttention(channels, options.heads, options.groups, options.stride,
                                   options.offset_kernel, options.size, options.deformable)
    if letter == 'N':
        return NeighborhoodAttention(channels, options.heads, options.kernel_size)
    if letter in 'LS':
        return WindowAttention(channels, options.heads, options.window_size, letter == 'S')
    if letter == 'P':
        return SpatialReductionAttention(channels, options.heads, options.stride)
    return nn.Conv2d(channels, channels, 7, padding=3, groups=channels)


class DATStage(nn.Module):
    """Blocks of one resolution.

    A block adds three branches to its input: the local perception unit, the attention, the
    feed-forward network. Block X has one: depthwise convolution, norm, feed-forward network.

    Args:
        channels: width c.
        letters: kind of every block, of `LETTERS`.
        drop_paths: drop-path probability of each block.
        options: of the stage.
    """

    def __init__(self, channels: int, letters: str, drop_paths: Sequence[float],
                 options: StageOptions) -> None:
        super().__init__()
        self.letters, self.with_cp = letters, options.with_cp
        mlp: Any = ConvFFN if options.use_dwc_mlp else MLP
        self.layer_norms = nn.ModuleList(
            nn.Identity() if letter == 'X' else map_norm(channels)
            for letter in letters for _ in range(2))
        self.ln_cnvnxt = nn.ModuleDict({
            str(index): map_norm(channels) for index, letter in enumerate(letters)
            if letter == 'X'})
        self.attns = nn.ModuleList(make_attention(letter, channels, options)
                                   for letter in letters)
        self.mlps = nn.ModuleList(mlp(channels, options.mlp_ratio) for _ in letters)
        self.local_perception_units = nn.ModuleList(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
            for _ in letters if options.use_lpu)
        self.layer_scales = nn.ModuleList(
            LayerScale(channels, options.layer_scale)
            if options.layer_scale is not None and letters[index // 2] != 'X' else nn.Identity()
            for index in range(2 * len(letters)))
        self.drop_path = nn.ModuleList(map(DropPath, drop_paths))

    def _block(self, x: Tensor, index: int) -> Tensor:
        if self.local_perception_units:
            x = x + self.local_perception_units[index](x)
        attend, mlp, drop = self.attns[index], self.mlps[index], self.drop_path[index]
        if self.letters[index] == 'X':
            return x + drop(mlp(self.ln_cnvnxt[str(index)](attend(x))))
        for place, layer in ((2 * index, attend), (2 * index + 1, mlp)):
            x = x + drop(self.layer_scales[place](layer(self.layer_norms[place](x))))
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, c, H, W) to (N, c, H, W)."""
        for index in range(len(self.letters)):
            x = (recompute(self._block, x, index) if self.with_cp and x.requires_grad
                 else self._block(x, index))
        return x
