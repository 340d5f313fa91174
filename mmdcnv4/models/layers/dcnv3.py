# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The DCNv3 layer, evaluated by the DCNv4 operator with its softmax.

Source:   "InternImage", Wang et al., CVPR 2023, arXiv:2211.05778, section 3.1.
Differs:  stride 1 and an output of the size of the input, as in all published models; offsets and
          masks come out of one matrix product, in the packing of the DCNv4 operator.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops import dcnv4, offset_mask_channels
from ...ops.module import OffsetMaskProj
from .norm import ToChannelsLast

ACTIVATIONS = {'GELU': nn.GELU, 'ReLU': nn.ReLU, 'SiLU': nn.SiLU}


class DCNv3(nn.Module):
    """DCNv3 with its projections, and the predictor of offsets and masks.

    Parameter names (`dw_conv`, `offset`, `mask`, `input_proj`, `output_proj`,
    `center_feature_scale_proj_*`) are those of the published InternImage checkpoints.

    At the start the offsets are zero and every mask is 1 / K: the layer averages its window.

    Args:
        channels: width C.
        kernel_size: odd.
        dw_kernel_size: odd size of the predictor's depthwise convolution; None for `kernel_size`.
        dilation: in pixels.
        group: number of groups G; must divide `channels`.
        offset_scale: factor on the kernel grid and on the offsets.
        act_layer: activation in the predictor, 'GELU', 'ReLU' or 'SiLU'.
        center_feature_scale: mix the projected input back in, by a gate that the predictor's
            branch gives (DCNv4 takes it from the output of the operator).
        remove_center: leave out the middle tap.

    Raises:
        ValueError: the message names the argument, the rule and the value.
    """

    def __init__(self, channels: int = 64, kernel_size: int = 3,
                 dw_kernel_size: Optional[int] = None, dilation: int = 1, group: int = 4,
                 offset_scale: float = 1.0, act_layer: str = 'GELU',
                 center_feature_scale: bool = False, remove_center: bool = False) -> None:
        super().__init__()
        dw_kernel_size = kernel_size if dw_kernel_size is None else dw_kernel_size
        for name, size in (('kernel_size', kernel_size), ('dw_kernel_size', dw_kernel_size)):
            if size < 1 or size % 2 == 0:
                raise ValueError(f'DCNv3: {name} must be odd, got {size}')
        if channels % group != 0:
            raise ValueError(f'DCNv3: group must divide channels ({channels}), got {group}')
        if act_layer not in ACTIVATIONS:
            raise ValueError(f'DCNv3: act_layer must be one of {tuple(ACTIVATIONS)}, '
                             f'got {act_layer!r}')
        self.channels, self.group = channels, group
        self.points = kernel_size**2 - int(remove_center)
        self.geometry: dict[str, Any] = dict(
            kernel_size=kernel_size, groups=group, padding=dilation * (kernel_size - 1) // 2,
            dilation=dilation, offset_scale=offset_scale, remove_center=remove_center)
        self.dw_conv = nn.Sequential(
            nn.Conv2d(channels, channels, dw_kernel_size, padding=dw_kernel_size // 2,
                      groups=channels),
            nn.Sequential(ToChannelsLast(), nn.LayerNorm(channels, eps=1e-6)),
            ACTIVATIONS[act_layer]())
        # no `nn.Linear`, so that initialisers by type leave the zero start alone
        self.offset = OffsetMaskProj(channels, 2 * self.points * group)
        self.mask = OffsetMaskProj(channels, self.points * group)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.center_feature_scale = center_feature_scale
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(group))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values: Xavier projections, zero offsets, equal masks."""
        for proj in (self.offset, self.mask):
            nn.init.zeros_(proj.weight)
            nn.init.zeros_(proj.bias)
        for linear in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    init_weights = reset_parameters  # the name by which OpenMMLab asks for it

    def _packed(self, offset: Tensor, mask: Tensor) -> Tensor:
        """Rows (2KG, ...) and (KG, ...) in the order of the operator: (P, ...)."""
        rows = torch.cat([offset.unflatten(0, (self.group, -1)),
                          mask.unflatten(0, (self.group, -1))], dim=1).flatten(0, 1)
        missing = offset_mask_channels(self.group, self.points) - rows.shape[0]
        return torch.cat([rows, rows.new_zeros(missing, *rows.shape[1:])])

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer.

        Args:
            x: shape (N, H, W, channels).

        Returns:
            Shape (N, H, W, channels).

        Raises:
            ValueError: `x` has another shape.
        """
        if x.dim() != 4 or x.shape[3] != self.channels:
            raise ValueError(f'DCNv3: x must have shape (N, H, W, {self.channels}), '
                             f'got {tuple(x.shape)}')
        value = self.input_proj(x)
        query = self.dw_conv(x.permute(0, 3, 1, 2))  # (N, H, W, C) -> (N, C, H, W) -> back
        offset_mask = F.linear(query, self._packed(self.offset.weight, self.mask.weight),
                               self._packed(self.offset.bias, self.mask.bias))
        out = dcnv4(value, offset_mask, softmax=True, **self.geometry)
        if self.center_feature_scale:
            gate = F.linear(query, self.center_feature_scale_proj_weight,
                            self.center_feature_scale_proj_bias).sigmoid()
            gate = gate.repeat_interleave(self.channels // self.group, dim=-1)
            out = out * (1 - gate) + value * gate
        return self.output_proj(out)
