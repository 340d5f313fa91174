# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The DCNv4 layer: projections and the predictor of offsets and masks around the operator.

Source:   "Efficient Deformable ConvNets", arXiv:2401.06197, section 3; `center_feature_scale` is
          that of the larger InternImage models, arXiv:2211.05778.
Differs:  (N, H, W, C) input instead of tokens; `in_channels`, `out_channels`, `softmax`,
          `mask_init`, rectangular kernels, and a definition for stride > 1, which the released
          layer does not have.
"""

from __future__ import annotations

import math
from numbers import Integral, Real
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .contract import IntOrPair, flag, make_geometry, offset_mask_channels, output_size
from .functional import apply_geometry

MASK_INITS = ('zero', 'center', 'box')


def _check_type(name: str, value: object, kind: type, words: str) -> None:
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f'DCNv4: {name} must be {words}, got {value!r}')


def _check_integers(**values: int) -> None:
    for name, value in values.items():
        _check_type(name, value, Integral, 'an int')
        if value < 1:
            raise ValueError(f'DCNv4: {name} must be >= 1, got {value}')


class OffsetMaskProj(nn.Module):
    """A linear layer C -> P that starts at zero.

    Deliberately not an `nn.Linear`: initialisers that pick layers by type (mmengine's `init_cfg`)
    would otherwise replace the zero start by random offsets.

    Args:
        in_features: C.
        out_features: P.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features))

    def forward(self, x: Tensor) -> Tensor:
        """Maps (..., C) to (..., P)."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Sizes, for `print(module)`."""
        return f'in_features={self.weight.shape[1]}, out_features={self.weight.shape[0]}'


class DCNv4(nn.Module):
    """DCNv4 with its input projection, offset and mask predictor, and output projection.

    Parameter names (`offset_mask`, `offset_mask_dw`, `value_proj`, `output_proj`,
    `center_feature_scale_proj_*`) are those of the published checkpoints.

    At the start the masks are zero, so the output is the bias of `output_proj`, zero: in a
    residual branch the layer starts as the identity. Where nothing bypasses the layer, set
    `mask_init`, or a ReLU after it never lets a gradient through.

    Args:
        channels: width C of the sampled value; of the input and the output, too, unless
            `in_channels` and `out_channels` are given.
        kernel_size: int or (height, width).
        stride: int or pair. The predictor is strided: its depthwise convolution, or without one
            the input pixel at the centre of each window (clamped to the map).
        pad: int or pair, pixels of zero padding.
        dilation: int or pair.
        group: number of groups G; must divide `channels`. Published: 16 channels each.
        offset_scale: factor on the kernel grid and on the offsets.
        dw_kernel_size: odd size of a depthwise convolution before the predictor; None for none.
        center_feature_scale: mix the projected input back in with a learned gate per group and
            position; needs stride 1 and an output of the size of the input.
        remove_center: leave out the middle tap.
        output_bias: whether `output_proj` has a bias.
        without_pointwise: no `value_proj` and `output_proj` (a drop-in for a depthwise
            convolution).
        softmax: normalise the masks over the taps of each group.
        in_channels, out_channels: widths of the input and of the output when they differ from
            `channels`: `value_proj` and `output_proj` change them.
        mask_init: initial value of every mask (a bias; the checkpoints' convention is 0), or
            'zero', 'box' (`1 / K`: the layer starts as the mean over its window) or 'center' (1
            for the middle tap, 0 for the others: it starts as the identity between its
            projections).

    Raises:
        TypeError, ValueError: the message names the argument, the rule and the value.
    """

    def __init__(self, channels: int = 64, kernel_size: IntOrPair = 3, stride: IntOrPair = 1,
                 pad: IntOrPair = 1, dilation: IntOrPair = 1, group: int = 4,
                 offset_scale: float = 1.0, dw_kernel_size: Optional[int] = None,
                 center_feature_scale: bool = False, remove_center: bool = False,
                 output_bias: bool = True, without_pointwise: bool = False,
                 softmax: bool = False, *, in_channels: Optional[int] = None,
                 out_channels: Optional[int] = None,
                 mask_init: Union[float, str] = 0.0) -> None:
        super().__init__()
        self.channels = channels
        self.in_channels = channels if in_channels is None else in_channels
        self.out_channels = channels if out_channels is None else out_channels
        _check_integers(channels=channels, in_channels=self.in_channels,
                        out_channels=self.out_channels, group=group)
        flag(output_bias, 'output_bias')
        flag(without_pointwise, 'without_pointwise')
        flag(center_feature_scale, 'center_feature_scale')
        if isinstance(mask_init, Real) and not math.isfinite(mask_init):
            raise ValueError(f'DCNv4: mask_init must be finite, got {mask_init}')
        self.geometry = make_geometry(
            kernel_size=kernel_size, groups=int(group), stride=stride, padding=pad,
            dilation=dilation, offset_scale=offset_scale, remove_center=remove_center,
            softmax=softmax)
        self._keeps_size = self.geometry.stride == (1, 1) and all(
            2 * p == d * (k - 1) for p, d, k in
            zip(self.geometry.padding, self.geometry.dilation, self.geometry.kernel_size))
        # the centre of every window is the pixel itself
        self._sees_input = self._keeps_size and dw_kernel_size is None
        is_number = isinstance(mask_init, Real) and not isinstance(mask_init, bool)
        self.mask_init = float(mask_init) if is_number else mask_init  # also NumPy's
        self._check_options(group, dw_kernel_size, center_feature_scale, without_pointwise)
        self._check_mask_init()

        if without_pointwise:
            self.value_proj = self.output_proj = None
        else:
            self.value_proj = nn.Linear(self.in_channels, channels)
            self.output_proj = nn.Linear(channels, self.out_channels, bias=output_bias)
        self.offset_mask_dw = None
        if dw_kernel_size is not None:
            # padded so that the depthwise window of an output has the centre of its DCNv4 window
            self._dw_padding = [dw_kernel_size // 2 + p - c for p, c in
                                zip(self.geometry.padding, self.geometry.center)]
            self.offset_mask_dw = nn.Conv2d(
                self.in_channels, self.in_channels, dw_kernel_size, groups=self.in_channels,
                stride=self.geometry.stride,
                padding=(max(self._dw_padding[0], 0), max(self._dw_padding[1], 0)))
        self.offset_mask = OffsetMaskProj(self.in_channels,
                                          offset_mask_channels(group, self.geometry.points))
        if center_feature_scale:
            self.center_feature_scale_proj_weight = nn.Parameter(torch.zeros(group, channels))
            self.center_feature_scale_proj_bias = nn.Parameter(torch.zeros(group))
        self.center_feature_scale = center_feature_scale
        self.reset_parameters()

    def _check_options(self, group: int, dw_kernel_size: Optional[int],
                       center_feature_scale: bool, without_pointwise: bool) -> None:
        if self.channels % group != 0:
            raise ValueError(f'DCNv4: group must divide channels ({self.channels}), got {group}')
        if dw_kernel_size is not None:
            _check_integers(dw_kernel_size=dw_kernel_size)
        if dw_kernel_size is not None and dw_kernel_size % 2 == 0:
            raise ValueError('DCNv4: dw_kernel_size must be odd, or the map would change its '
                             f'size, got {dw_kernel_size}')
        for name in ('in_channels', 'out_channels'):
            if without_pointwise and getattr(self, name) != self.channels:
                raise ValueError(f'DCNv4: {name} must equal channels ({self.channels}) with '
                                 f'without_pointwise=True, got {getattr(self, name)}')
        if center_feature_scale and not self._keeps_size:
            raise ValueError('DCNv4: center_feature_scale needs an output of the size of the '
                             f'input, got {self.geometry}')

    def _check_mask_init(self) -> None:
        if not isinstance(self.mask_init, str):
            _check_type('mask_init', self.mask_init, Real, f'a number or one of {MASK_INITS}')
        elif self.mask_init not in MASK_INITS:
            raise ValueError(f'DCNv4: mask_init must be a number or one of {MASK_INITS}, '
                             f'got {self.mask_init!r}')
        elif self.mask_init == 'center' and (self.geometry.remove_center or any(
                size % 2 == 0 for size in self.geometry.kernel_size)):
            raise ValueError("DCNv4: mask_init must not be 'center' where the kernel has no middle "
                             f'tap, got {self.geometry}')

    def reset_parameters(self) -> None:
        """Initial values: Xavier projections, zero offsets, masks of `mask_init`."""
        nn.init.zeros_(self.offset_mask.weight)
        with torch.no_grad():
            self.offset_mask.bias.copy_(self._offset_mask_bias())
        if self.offset_mask_dw is not None:
            self.offset_mask_dw.reset_parameters()
        for proj in (self.value_proj, self.output_proj):
            if proj is not None:
                nn.init.xavier_uniform_(proj.weight)
                if proj.bias is not None:
                    nn.init.zeros_(proj.bias)
        if self.center_feature_scale:
            nn.init.zeros_(self.center_feature_scale_proj_weight)
            nn.init.zeros_(self.center_feature_scale_proj_bias)

    init_weights = reset_parameters  # the name by which OpenMMLab asks for it

    def _offset_mask_bias(self) -> Tensor:
        groups, points = self.geometry.groups, self.geometry.points
        bias = torch.zeros_like(self.offset_mask.bias)
        masks = bias[:groups * 3 * points].view(groups, 3 * points)[:, 2 * points:]
        if self.mask_init == 'center':
            masks[:, points // 2] = 1.0  # odd sizes: the middle of either order of the taps
        elif self.mask_init != 'zero':
            masks.fill_(1 / points if self.mask_init == 'box' else float(self.mask_init))
        return bias

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer.

        Args:
            x: shape (N, H, W, in_channels).

        Returns:
            Shape (N, Ho, Wo, out_channels).

        Raises:
            ValueError: `x` has another shape.
        """
        out, output_proj = self._sample(x), self.output_proj
        return out if output_proj is None else output_proj(out)

    def _sample(self, x: Tensor) -> Tensor:
        """The layer before `output_proj`: (N, H, W, in_channels) to (N, Ho, Wo, channels)."""
        if x.dim() != 4 or x.shape[3] != self.in_channels:
            raise ValueError(f'DCNv4: x must have shape (N, H, W, {self.in_channels}), '
                             f'got {tuple(x.shape)}')
        value_proj = self.value_proj  # looked up once: nn.Module searches on every access
        value = x if value_proj is None else value_proj(x)
        offset_mask = self.offset_mask(x if self._sees_input else self._predictor_input(x))
        out = apply_geometry(value, offset_mask, self.geometry)
        return self._mix_center(out, value) if self.center_feature_scale else out

    def _predictor_input(self, x: Tensor) -> Tensor:
        """Brings the input of the predictor to the output positions: (N, Ho, Wo, in_channels)."""
        depthwise = self.offset_mask_dw
        if depthwise is not None and self._keeps_size:  # its kernel is odd: it keeps the size too
            return depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # (N, C, H, W) and back
        out_h, out_w = output_size(x.shape[1], x.shape[2], self.geometry)
        if depthwise is not None:
            u = x.permute(0, 3, 1, 2)  # (N, H, W, C) -> (N, C, H, W)
            crop_h, crop_w = (max(-p, 0) for p in self._dw_padding)
            u = u[:, :, crop_h:u.shape[2] - crop_h, crop_w:u.shape[3] - crop_w]
            return depthwise(u).permute(0, 2, 3, 1)[:, :out_h, :out_w]
        rows, columns = (self._window_centers(axis, count, x) for axis, count in
                         ((0, out_h), (1, out_w)))
        return x[:, rows[:, None], columns]

    def _window_centers(self, axis: int, count: int, x: Tensor) -> Tensor:
        geometry = self.geometry
        centers = (torch.arange(count, device=x.device) * geometry.stride[axis]
                   - geometry.padding[axis] + geometry.center[axis])
        return centers.clamp(0, x.shape[1 + axis] - 1)

    def _mix_center(self, out: Tensor, value: Tensor) -> Tensor:
        gate = F.linear(out, self.center_feature_scale_proj_weight,
                        self.center_feature_scale_proj_bias).sigmoid()
        gate = gate.repeat_interleave(self.channels // self.geometry.groups, dim=-1)
        return out * (1 - gate) + value * gate

    def extra_repr(self) -> str:
        """Geometry, for `print(module)`."""
        g = self.geometry
        return (f'{self.in_channels}, {self.out_channels}, channels={self.channels}, '
                f'kernel_size={g.kernel_size}, stride={g.stride}, pad={g.padding}, '
                f'dilation={g.dilation}, group={g.groups}, offset_scale={g.offset_scale}, '
                f'remove_center={g.remove_center}, softmax={g.softmax}')
