# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Parts of FlashInternImage and InternImage: stem, block, stage.

Source:   "InternImage", Wang et al., CVPR 2023, arXiv:2211.05778, section 3.2, and "Efficient
          Deformable ConvNets", Xiong et al., CVPR 2024, arXiv:2401.06197, section 4.
Names:    attributes are those of the published state dicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional, Union

import torch
from mmcv.cnn.bricks import DropPath
from torch import Tensor, nn

from ...ops import DCNv4
from .backbone import recompute
from .dcnv3 import ACTIVATIONS, DCNv3
from .local_attention import WindowAttention
from .norm import ToChannelsFirst, ToChannelsLast

CORE_OPS = ('DCNv4', 'DCNv3', 'DWConv', 'DWConv7x7', 'WindowAttention')
_WINDOW = 7  # side of the windows of attention, as in Swin Transformer
_EPS = 1e-6


@dataclass(frozen=True)
class BlockOptions:
    """What all blocks of a backbone have in common; names and meaning as in FlashInternImage."""

    core_op: str
    mlp_ratio: float
    drop_rate: float
    act_layer: str
    layer_scale: Optional[float]
    offset_scale: float
    post_norm: bool
    res_post_norm: bool
    dw_kernel_size: Optional[int]
    dcn_output_bias: bool
    mlp_fc2_bias: bool
    center_feature_scale: bool
    mask_init: Union[float, str]
    with_cp: bool


def _layer_norm(channels: int) -> nn.Sequential:
    """Norm of a channels-last map, at index 0: the published keys end in `.0.weight`."""
    return nn.Sequential(nn.LayerNorm(channels, eps=_EPS))


class Stem(nn.Module):
    """Two 3x3 convolutions of stride 2, each with a norm: (N, 3, H, W) -> (N, H/4, W/4, C)."""

    def __init__(self, in_channels: int, channels: int, act_layer: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels // 2, 3, stride=2, padding=1)
        self.norm1 = nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels // 2, eps=_EPS),
                                   ToChannelsFirst())
        self.act = ACTIVATIONS[act_layer]()
        self.conv2 = nn.Conv2d(channels // 2, channels, 3, stride=2, padding=1)
        self.norm2 = nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels, eps=_EPS))

    def forward(self, x: Tensor) -> Tensor:
        """Maps an image (N, 3, H, W) to (N, ceil(H / 4), ceil(W / 4), C)."""
        return self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))


class Downsample(nn.Module):
    """Halves the map and doubles the channels: (N, H, W, c) -> (N, H/2, W/2, 2c)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=False)
        self.norm = nn.Sequential(ToChannelsLast(), nn.LayerNorm(2 * channels, eps=_EPS))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, H, W, c) to (N, ceil(H / 2), ceil(W / 2), 2c)."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)))


class MLP(nn.Module):
    """Two linear layers per pixel, `mlp_ratio * channels` wide in between."""

    def __init__(self, channels: int, options: BlockOptions) -> None:
        super().__init__()
        hidden = int(channels * options.mlp_ratio)
        self.fc1 = nn.Linear(channels, hidden)
        self.act = ACTIVATIONS[options.act_layer]()
        self.fc2 = nn.Linear(hidden, channels, bias=options.mlp_fc2_bias)
        self.drop = nn.Dropout(options.drop_rate)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., c) to (..., c)."""
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DWConv(nn.Module):
    """A depthwise convolution between two projections: what DCNv4 would be without sampling.

    For comparisons. The taps rest and their weights do not depend on the input.

    Args:
        channels: width C.
        output_bias: whether `output_proj` has a bias.
        kernel_size: odd.
    """

    def __init__(self, channels: int, output_bias: bool, kernel_size: int = 3) -> None:
        super().__init__()
        self.value_proj = nn.Linear(channels, channels)
        self.conv = nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2,
                              groups=channels)
        self.output_proj = nn.Linear(channels, channels, bias=output_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values: Xavier projections as in DCNv4, those of torch for the convolution."""
        self.conv.reset_parameters()
        for proj in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(proj.weight)
            if proj.bias is not None:
                nn.init.zeros_(proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, H, W, C) to (N, H, W, C)."""
        x = self.value_proj(x).permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W) -> back
        return self.output_proj(self.conv(x).permute(0, 2, 3, 1))


def _core(channels: int, group: int, options: BlockOptions,
          shifted: bool) -> Union[DCNv4, DCNv3, DWConv, nn.Sequential]:
    """The layer that mixes positions; `shifted` only matters to windows."""
    if options.core_op in ('DWConv', 'DWConv7x7'):
        return DWConv(channels, options.dcn_output_bias, 3 if options.core_op == 'DWConv' else 7)
    if options.core_op == 'WindowAttention':
        return nn.Sequential(
            ToChannelsFirst(),
            WindowAttention(channels, group, _WINDOW, shifted, attend_padding=False),
            ToChannelsLast())
    if options.core_op == 'DCNv3':
        return DCNv3(channels, group=group, offset_scale=options.offset_scale,
                     dw_kernel_size=options.dw_kernel_size, act_layer=options.act_layer,
                     center_feature_scale=options.center_feature_scale)
    return DCNv4(
        channels, kernel_size=3, stride=1, pad=1, dilation=1, group=group,
        offset_scale=options.offset_scale, dw_kernel_size=options.dw_kernel_size,
        center_feature_scale=options.center_feature_scale,
        output_bias=options.dcn_output_bias, mask_init=options.mask_init)


class InternImageBlock(nn.Module):
    """Deformable convolution and MLP, each in a residual branch.

    Args:
        channels: width c.
        group: groups of the deformable convolution.
        drop_path: probability with which a sample skips a branch.
        options: of the backbone.
        shifted: whether windows of attention lie between those of the block before.
    """

    def __init__(self, channels: int, group: int, drop_path: float,
                 options: BlockOptions, shifted: bool = False) -> None:
        super().__init__()
        self.post_norm = options.post_norm
        self.with_cp = options.with_cp
        self.layer_scale = options.layer_scale
        # as in the released models, layer scale and post-norm take precedence
        self.res_post_norm = (options.res_post_norm and options.layer_scale is None
                              and not options.post_norm)
        self.norm1 = _layer_norm(channels)
        self.dcn = _core(channels, group, options, shifted)
        self.drop_path = DropPath(drop_path)
        self.norm2 = _layer_norm(channels)
        self.mlp = MLP(channels, options)
        if options.layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((channels,), float(options.layer_scale)))
            self.gamma2 = nn.Parameter(torch.full((channels,), float(options.layer_scale)))
        if options.res_post_norm:  # in the state dict even without effect; then no gradient
            self.res_post_norm1 = _layer_norm(channels).requires_grad_(self.res_post_norm)
            self.res_post_norm2 = _layer_norm(channels).requires_grad_(self.res_post_norm)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, H, W, c) to (N, H, W, c)."""
        if self.with_cp and x.requires_grad:
            return recompute(self._forward, x)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self._branch(1, x))
        return x + self.drop_path(self._branch(2, x))

    def _branch(self, index: int, x: Tensor) -> Tensor:
        """Branch 1 (convolution) or 2 (MLP) with its norms and its layer scale."""
        layer, norm = (self.dcn, self.norm1) if index == 1 else (self.mlp, self.norm2)
        x = norm(layer(x)) if self.post_norm else layer(norm(x))
        if self.res_post_norm:
            x = (self.res_post_norm1 if index == 1 else self.res_post_norm2)(x)
        if self.layer_scale is not None:
            x = x * (self.gamma1 if index == 1 else self.gamma2)
        return x


class Stage(nn.Module):
    """Blocks of one resolution, and the layer that leads to the next stage.

    Args:
        channels: width c.
        group: groups of the deformable convolutions.
        drop_paths: drop-path probability of each block; its length is the depth.
        options: of the backbone.
        has_downsample: False for the last stage.
        post_norm_block_ids: blocks that are followed by one more norm.
    """

    def __init__(self, channels: int, group: int, drop_paths: Sequence[float],
                 options: BlockOptions, has_downsample: bool,
                 post_norm_block_ids: Sequence[int] = ()) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            InternImageBlock(channels, group, rate, options, shifted=index % 2 == 1)
            for index, rate in enumerate(drop_paths))
        self.norm = (_layer_norm(channels)
                     if not options.post_norm or options.center_feature_scale else None)
        self.post_norm_block_ids = tuple(post_norm_block_ids)
        if self.post_norm_block_ids:
            self.post_norms = nn.ModuleList(
                _layer_norm(channels) for _ in self.post_norm_block_ids)
        self.downsample = Downsample(channels) if has_downsample else None

    def forward(self, x: Tensor) -> Tensor:
        """Runs the blocks and the norm, not `downsample`: (N, H, W, c) -> (N, H, W, c)."""
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index in self.post_norm_block_ids:
                x = self.post_norms[self.post_norm_block_ids.index(index)](x)
        return x if self.norm is None else self.norm(x)
