# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Layer normalisation over channels, for maps in either memory order."""

from __future__ import annotations

from collections import OrderedDict
from numbers import Integral

from mmengine.registry import MODELS
from torch import Tensor, nn

from ...errors import user_arguments
from .arguments import Arguments


class ToChannelsLast(nn.Module):
    """(N, C, H, W) -> (N, H, W, C), a view."""

    def forward(self, x: Tensor) -> Tensor:
        """Moves the channels to the end."""
        return x.permute(0, 2, 3, 1)


class ToChannelsFirst(nn.Module):
    """(N, H, W, C) -> (N, C, H, W), a view."""

    def forward(self, x: Tensor) -> Tensor:
        """Moves the channels next to the batch axis."""
        return x.permute(0, 3, 1, 2)


def map_norm(channels: int) -> nn.Sequential:
    """Norm of a (N, C, H, W) map over its channels, with keys `norm.weight` and `norm.bias`.

    The result has the shape of the map and NHWC memory order, in which 1x1 convolutions and the
    next norm need no copy.
    """
    return nn.Sequential(OrderedDict(
        to_last=ToChannelsLast(), norm=nn.LayerNorm(channels), to_first=ToChannelsFirst()))


@MODELS.register_module('ChannelLN')
class ChannelLayerNorm(nn.LayerNorm):
    """Layer normalisation over the channels of every pixel of a (N, C, H, W) map.

    mmcv's own 'LN' is `nn.LayerNorm`, which normalises the last axis and so cannot stand in
    `norm_cfg` of a convolutional neck. `norm_cfg=dict(type='ChannelLN')` in mmdet's stock `FPN`
    gives the neck of the FlashInternImage detectors; mmcv names the child `ln`, as in their
    published weights, and sets `eps` to 1e-5 unless told otherwise.

    Args:
        num_features: C.
        eps: added to the variance.
        elementwise_affine: whether there are a weight and a bias per channel.

    Raises:
        ValueError: the message names the argument, the rule and the value.
    """

    @user_arguments('ChannelLN')
    def __init__(self, num_features: int, eps: float = 1e-5,
                 elementwise_affine: bool = True) -> None:
        check = Arguments('ChannelLN')
        check.positive('num_features', num_features, Integral)
        check.positive('eps', eps)
        check.flag('elementwise_affine', elementwise_affine)
        super().__init__(num_features, eps=eps, elementwise_affine=elementwise_affine)

    def forward(self, x: Tensor) -> Tensor:
        """Normalises `x` of shape (N, C, H, W).

        Returns:
            Shape of `x`, NCHW-contiguous: some operators of mmcv read their input as if it were.

        Raises:
            ValueError: `x` has another shape.
        """
        if x.dim() != 4 or x.shape[1] != self.normalized_shape[0]:
            raise ValueError(f'ChannelLN: x must have shape (N, {self.normalized_shape[0]}, H, W),'
                             f' got {tuple(x.shape)}')
        x = super().forward(x.permute(0, 2, 3, 1))  # (N, C, H, W) -> (N, H, W, C)
        return x.permute(0, 3, 1, 2).contiguous()  # (N, H, W, C) -> (N, C, H, W)
