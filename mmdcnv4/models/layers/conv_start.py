# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Initial values of a DCNv4 layer from those of the convolution that it replaces.

DCNv4 has no weight per tap and channel: with zero offsets it sums its taps with one mask per group,
the same for all channels of the group. A kernel is a function of that kind only if, in every group,
all channels have the same taps up to a factor. What is closest is taken, and how close it is, told.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .dcnv4_conv import DCNv4Conv2d

STARTS = ('center', 'conv')


@torch.no_grad()
def start_from_conv(layer: DCNv4Conv2d, conv: nn.Conv2d, kind: str) -> str:
    """Sets the masks, projections and the bias of `layer`; its offsets stay zero.

    A depthwise kernel ('conv') becomes the mean over the channels of each group: exact where those
    are equal, as for groups of one channel. A regular kernel becomes the masks and the output
    projection that are closest to it, by a singular value decomposition per group. 'center' takes
    the middle tap alone: the identity for a depthwise convolution, a 1x1 convolution for another.

    Args:
        layer: the new layer; its value has the width of the input.
        conv: the old one.
        kind: 'conv' or 'center'.

    Returns:
        A note for the report: the share of the squared weights that is kept, or why nothing was.
    """
    geometry = layer.geometry
    has_masks = not (geometry.remove_center or geometry.softmax)
    is_depthwise = conv.groups > 1
    if kind == 'conv' and geometry.kernel_size != tuple(conv.kernel_size):
        return 'start not taken over: another kernel'
    if not has_masks or not is_depthwise and (layer.output_proj is None
                                              or layer.channels != conv.in_channels):
        return 'start not taken over: its masks or projections cannot represent a kernel'
    weight = conv.weight.detach()
    if is_depthwise:
        kept = _start_from_depthwise(layer, weight, kind)
    else:
        kept = _start_from_regular(layer, weight, kind)
    bias = layer.output_bias if layer.output_proj is None else layer.output_proj.bias
    if conv.bias is not None and bias is not None:
        bias.copy_(conv.bias)
    layer.__dict__['is_init'] = True  # read by mmengine, which would otherwise reset the layer
    return '' if weight.is_meta else f'start keeps {100 * float(kept):.0f} % of the kernel'


def _set_masks(layer: DCNv4Conv2d, masks: Tensor) -> None:
    """Sets the masks of every group, (G, K) in the order of the operator."""
    groups, points = layer.geometry.groups, layer.geometry.points
    bias = layer.offset_mask.bias
    bias.zero_()
    bias[:groups * 3 * points].view(groups, 3 * points)[:, 2 * points:] = masks.to(bias.dtype)


def _column_major(weight: Tensor) -> Tensor:
    """(..., kh, kw) -> (..., K): the operator counts its taps column by column."""
    return weight.transpose(-2, -1).flatten(-2)


def _middle(layer: DCNv4Conv2d) -> Tensor:
    masks = layer.offset_mask.bias.new_zeros(layer.geometry.groups, layer.geometry.points)
    masks[:, layer.geometry.points // 2] = 1.0
    return masks


def _set_identity(projection: nn.Linear) -> None:
    nn.init.eye_(projection.weight)
    if projection.bias is not None:
        nn.init.zeros_(projection.bias)


def _start_from_depthwise(layer: DCNv4Conv2d, weight: Tensor, kind: str) -> Tensor:
    for projection in (layer.value_proj, layer.output_proj):
        if projection is not None:
            _set_identity(projection)
    taps = _column_major(weight.float()).view(layer.geometry.groups, -1, weight[0, 0].numel())
    if kind == 'center':
        _set_masks(layer, _middle(layer))
        middle = taps[..., taps.shape[-1] // 2]
        return middle.square().sum() / taps.square().sum()
    masks = taps.mean(1)
    _set_masks(layer, masks)
    return 1 - (taps - masks[:, None]).square().sum() / taps.square().sum()


def _start_from_regular(layer: DCNv4Conv2d, weight: Tensor, kind: str) -> Tensor:
    assert layer.value_proj is not None and layer.output_proj is not None
    _set_identity(layer.value_proj)
    output = layer.output_proj.weight
    if kind == 'center':
        middle = weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2]
        _set_masks(layer, _middle(layer))
        output.copy_(middle)
        return middle.float().square().sum() / weight.float().square().sum()
    groups = layer.geometry.groups
    # (O, I, kh, kw) -> (G, O * D, K): one matrix of rank one per group is what can be kept
    taps = _column_major(weight.float()).unflatten(1, (groups, -1)).transpose(0, 1)
    left, values, right = torch.linalg.svd(taps.flatten(1, 2), full_matrices=False)
    masks = right[:, 0]  # of length one; their sign is free
    sign = torch.where(masks.sum(1, keepdim=True) < 0, -1.0, 1.0)
    _set_masks(layer, masks * sign)
    factors = (left[..., 0] * values[:, :1] * sign).view(groups, weight.shape[0], -1)
    output.copy_(factors.transpose(0, 1).flatten(1))  # (O, G * D)
    return values[:, 0].square().sum() / values.square().sum()
