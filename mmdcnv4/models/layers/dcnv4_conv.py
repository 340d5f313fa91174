# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""DCNv4 as a convolution layer of mmcv: NCHW in and out, built by `dict(type='DCNv4')`.

Source:   "Efficient Deformable ConvNets", arXiv:2401.06197, section 3.
Differs:  different numbers of input and output channels, stride, any kernel; an initial value of
          the masks that lets a plain convolution learn.
"""

from __future__ import annotations

from numbers import Integral
from types import SimpleNamespace
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from ...errors import user_arguments
from ...ops import DCNv4
from ...ops.contract import IntOrPair

MIN_GROUP_WIDTH = 16


def default_group(channels: int) -> int:
    """Largest number of equal groups of at least 16 channels; 1 for narrower layers.

    Raises:
        TypeError: `channels` is not an int.
    """
    if not isinstance(channels, Integral) or isinstance(channels, bool):
        raise TypeError(f'DCNv4: out_channels must be an int, got {channels!r}')
    for width in range(MIN_GROUP_WIDTH, channels + 1):
        if channels % width == 0:
            return channels // width
    return 1


class _Parameters(dict):
    """Says why what replaces a parameter of a convolution does not find it here."""

    def __missing__(self, name: str) -> nn.Parameter:
        raise NotImplementedError(
            f'DCNv4: the layer has no parameter {name!r} of its own that spectral norm, weight '
            'norm or pruning could replace; leave out with_spectral_norm, or apply it to '
            'the output_proj of the layer')

    def __delitem__(self, name: str) -> None:
        if name not in self:
            self.__missing__(name)
        super().__delitem__(name)


class _NoProjection:
    """Stands for the weight of a layer without one; any use of it is an error that says so."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__'):  # how Python and torch look at an object
            raise AttributeError(name)
        raise NotImplementedError(
            'DCNv4: with without_pointwise=True the layer has no output projection, whose weight '
            'and bias initialisers and the fusion with a batch norm ask for')


_NO_PROJECTION = SimpleNamespace(weight=_NoProjection(), bias=_NoProjection())


@MODELS.register_module('DCNv4')
class DCNv4Conv2d(DCNv4):
    """Takes the place of a convolution: `conv_cfg=dict(type='DCNv4')`, or `dcn=` in a ResNet.

    The first eight arguments are those of a convolution, as mmcv passes them; the others tune
    DCNv4 and stand in the config dict. Parameter names are those of :class:`mmdcnv4.ops.DCNv4`.

    `weight` and `bias` are those of the output projection, the last step of the layer: what an
    initialiser of mmcv asks for (zeros, a standard deviation) holds for the output, and
    `efficient_conv_bn_eval` folds a batch norm into it. Spectral and weight norm are refused.

    Args:
        in_channels: width of the input.
        out_channels: width of the output.
        kernel_size, stride, padding, dilation: int or (height, width), in input pixels.
        groups: of an ordinary convolution; must be 1: a grouped one, as in ResNeXt, cannot be
            replaced. DCNv4's own groups are `group`.
        bias: whether the result has a bias: that of the output projection, or `output_bias` where
            there is none.
        group: number of channel groups, each with its own offsets and masks; must divide
            `value_channels`. None for as many groups of at least 16 channels as fit.
        value_channels: width in which the operator samples. None for `out_channels`: the first
            projection changes the width. `in_channels` leaves that to the last one, which is
            smaller where the layer widens, as in a U-Net.
        offset_scale: factor on the kernel grid and on the offsets.
        dw_kernel_size: odd size of a depthwise convolution before the predictor; None for none.
        remove_center: leave out the middle tap.
        softmax: normalise the masks over the taps of each group.
        without_pointwise: no projections, as in a depthwise convolution.
        center_feature_scale: mix the projected input back in with a learned gate.
        mask_init: initial value of every mask, or 'zero', 'box', 'center' as in
            :class:`mmdcnv4.ops.DCNv4`. None for 'box', the mean over the window of K taps: the
            zero start that suits a residual branch gives a zero map here, and a ReLU after it
            blocks the gradient permanently.
        deform_groups: of DCN and DCNv2; refused. It comes from a config that is inherited.

    Raises:
        TypeError, ValueError: the message names the argument, the rule and the value.
    """

    @user_arguments('DCNv4')
    def __init__(self, in_channels: int, out_channels: int, kernel_size: IntOrPair,
                 stride: IntOrPair = 1, padding: IntOrPair = 0, dilation: IntOrPair = 1,
                 groups: int = 1, bias: bool = True, *, group: Optional[int] = None,
                 value_channels: Optional[int] = None, offset_scale: float = 1.0,
                 dw_kernel_size: Optional[int] = None, remove_center: bool = False,
                 softmax: bool = False, without_pointwise: bool = False,
                 center_feature_scale: bool = False, mask_init: Union[float, str, None] = None,
                 deform_groups: Optional[int] = None) -> None:
        if deform_groups is not None:
            raise TypeError('DCNv4: deform_groups must not be given, DCNv4 has `group`; to replace '
                            "the dcn of an inherited config write dcn=dict(_delete_=True, "
                            f"type='DCNv4', ...), got deform_groups={deform_groups!r}")
        if not isinstance(groups, Integral) or groups != 1:
            depthwise = groups == in_channels == out_channels
            raise ValueError('DCNv4: groups must be 1: ' + (
                "for a depthwise convolution (CSPNeXt) write type='with_dcnv4' around the module "
                'instead of conv_cfg' if depthwise else
                'a grouped convolution (ResNeXt, RegNet, ResNeSt) cannot be replaced')
                + f', and the channel groups of DCNv4 are set by `group`, got groups={groups}')
        width = out_channels if value_channels is None else value_channels
        super().__init__(
            width, kernel_size, stride, padding, dilation,
            default_group(width) if group is None else group, offset_scale,
            dw_kernel_size, center_feature_scale, remove_center, output_bias=bias,
            without_pointwise=without_pointwise, softmax=softmax, in_channels=in_channels,
            out_channels=out_channels, mask_init='box' if mask_init is None else mask_init)
        self.output_bias: Optional[nn.Parameter] = (nn.Parameter(torch.zeros(out_channels))
                            if bias and without_pointwise else None)
        # what mmcv reads from a convolution layer
        self.kernel_size = self.geometry.kernel_size
        self.stride = self.geometry.stride
        self.padding = self.geometry.padding
        self.dilation = self.geometry.dilation
        self.groups = 1
        self.transposed = False
        self.output_padding = (0, 0)
        self._parameters = _Parameters(self._parameters)

    __jit_unused_properties__ = ['weight', 'bias']

    @property
    def weight(self) -> nn.Parameter:
        """That of the output projection, shape (out_channels, value_channels)."""
        return self._projection().weight

    @property
    def bias(self) -> Optional[nn.Parameter]:
        """That of the output projection, shape (out_channels,); None where it has none."""
        return self._projection().bias

    def _projection(self) -> Any:
        return _NO_PROJECTION if self.output_proj is None else self.output_proj

    def reset_parameters(self) -> None:
        """Initial values: those of the layer, and a bias of zero."""
        super().reset_parameters()
        bias = getattr(self, 'output_bias', None)  # made after the first call
        if bias is not None:
            nn.init.zeros_(bias)

    init_weights = reset_parameters  # the name by which OpenMMLab asks for it

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer.

        Args:
            x: shape (N, in_channels, H, W).

        Returns:
            Shape (N, out_channels, Ho, Wo), NCHW-contiguous: some operators of mmcv read their
            input as if it were.

        Raises:
            ValueError: `x` has another shape.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f'DCNv4: x must have shape (N, {self.in_channels}, H, W), '
                             f'got {tuple(x.shape)}')
        out = super().forward(x.permute(0, 2, 3, 1))  # (N, C, H, W) -> (N, H, W, C)
        if self.output_bias is not None:
            out = out + self.output_bias
        return out.permute(0, 3, 1, 2).contiguous()  # (N, H, W, C) -> (N, C, H, W)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Optional[Tensor]) -> Tensor:
        """`forward` with another output projection; `efficient_conv_bn_eval` of mmcv calls it."""
        out = F.linear(self._sample(x.permute(0, 2, 3, 1)), weight, bias)
        return out.permute(0, 3, 1, 2).contiguous()
