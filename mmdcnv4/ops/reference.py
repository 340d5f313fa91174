# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The specification of DCNv4 in plain PyTorch: slow, differentiable, any device, any float dtype.

Source:   "Efficient Deformable ConvNets: Rethinking Dynamic and Sparse Operator for Vision
          Applications", Xiong et al., CVPR 2024, arXiv:2401.06197, section 3.
Differs:  any kernel size, stride, padding, dilation and group width; `softmax` gives the
          normalised masks of DCNv3 (arXiv:2211.05778).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import HALF_DTYPES, Geometry, IntOrPair, check_tensors, make_geometry


def dcnv4_reference(value: Tensor, offset_mask: Tensor, *, kernel_size: IntOrPair, groups: int,
                    stride: IntOrPair = (1, 1), padding: IntOrPair = (0, 0),
                    dilation: IntOrPair = (1, 1), offset_scale: float = 1.0,
                    remove_center: bool = False, softmax: bool = False) -> Tensor:
    """Computes `dcnv4` by gathering the four neighbours of every sample by index.

    Arguments, result and errors are those of :func:`mmdcnv4.ops.dcnv4`. It keeps
    4 * K * groups samples of D channels per output position for the backward pass; double
    backward works. Half inputs are computed in float32 and rounded once.
    """
    geometry = make_geometry(kernel_size=kernel_size, groups=groups, stride=stride,
                             padding=padding, dilation=dilation, offset_scale=offset_scale,
                             remove_center=remove_center, softmax=softmax)
    return evaluate_reference(value, offset_mask, geometry)


def evaluate_reference(value: Tensor, offset_mask: Tensor, geometry: Geometry) -> Tensor:
    """`dcnv4_reference` with its scalars already checked.

    Args:
        value: (N, H, W, C).
        offset_mask: (N, Ho, Wo, P).
        geometry: of the call.

    Returns:
        (N, Ho, Wo, C).

    Raises:
        TypeError, ValueError: the tensors do not fit the geometry.
    """
    out_h, out_w = check_tensors(value, offset_mask, geometry)
    if value.dtype in HALF_DTYPES:
        return _evaluate(value.float(), offset_mask.float(), geometry, out_h,
                         out_w).to(value.dtype)
    return _evaluate(value, offset_mask, geometry, out_h, out_w)


def _evaluate(value: Tensor, offset_mask: Tensor, geometry: Geometry, out_h: int,
              out_w: int) -> Tensor:
    batch, height, width, channels = value.shape
    offset, mask = split_offset_mask(offset_mask, geometry)
    if geometry.softmax:
        mask = mask.softmax(dim=-1)
    x, y = sampling_positions(offset, geometry, out_h, out_w)
    # (N, H*W, G, D) -> (N, G, H*W, D): the samples of a group are rows of its own matrix
    groups = geometry.groups
    rows = value.reshape(batch, height * width, groups, channels // groups).transpose(1, 2)
    sample = _bilinear(rows, x, y, height, width)  # (N, G, Ho*Wo*K, D)
    weight = torch.where(_inside(x, y, height, width), mask, mask.new_zeros(()))
    weight = weight.permute(0, 3, 1, 2, 4)  # (N, Ho, Wo, G, K) -> (N, G, Ho, Wo, K)
    # not `*weight.shape`: the tracing exporter of ONNX would take its sizes for constants
    sample = sample.reshape(batch, groups, out_h, out_w, geometry.points, channels // groups)
    out = (weight.unsqueeze(-1) * sample).sum(dim=4)  # (N, G, Ho, Wo, D)
    return out.permute(0, 2, 3, 1, 4).reshape(batch, out_h, out_w, channels)


def split_offset_mask(offset_mask: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Unpacks (N, Ho, Wo, P) into offsets (N, Ho, Wo, G, K, 2) in (x, y) and masks (…, G, K)."""
    groups, points = geometry.groups, geometry.points
    packed = offset_mask[..., :groups * 3 * points].unflatten(-1, (groups, 3 * points))
    return packed[..., :2 * points].unflatten(-1, (points, 2)), packed[..., 2 * points:]


def sampling_positions(offset: Tensor, geometry: Geometry, out_h: int,
                       out_w: int) -> tuple[Tensor, Tensor]:
    """Sampling positions in input pixels, pixel centres on the integers.

    Args:
        offset: (N, Ho, Wo, G, K, 2), in (x, y) order, before scaling.
        geometry: of the call.
        out_h, out_w: size of the output map.

    Returns:
        x and y, each (N, Ho, Wo, G, K).
    """
    center_y, center_x = geometry.center
    taps = torch.tensor(geometry.taps(), dtype=offset.dtype, device=offset.device)  # (K, 2): y, x
    rows = torch.arange(out_h, dtype=offset.dtype, device=offset.device)
    columns = torch.arange(out_w, dtype=offset.dtype, device=offset.device)
    tap_y = taps[:, 0] * geometry.dilation[0] - center_y
    tap_x = taps[:, 1] * geometry.dilation[1] - center_x
    base_y = rows * geometry.stride[0] - geometry.padding[0] + center_y
    base_x = columns * geometry.stride[1] - geometry.padding[1] + center_x
    x = base_x[:, None, None] + (tap_x + offset[..., 0]) * geometry.offset_scale
    y = base_y[:, None, None, None] + (tap_y + offset[..., 1]) * geometry.offset_scale
    return x, y


def _inside(x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    """Whether a sample has a neighbour in the image; NaN is outside."""
    return (x > -1) & (x < width) & (y > -1) & (y < height)


def _bilinear(rows: Tensor, x: Tensor, y: Tensor, height: int, width: int) -> Tensor:
    """Samples `rows` (N, G, H*W, D) at x, y (N, Ho, Wo, G, K) -> (N, G, Ho*Wo*K, D)."""
    inside = _inside(x, y, height, width)
    x = torch.where(inside, x, x.new_zeros(()))  # finite positions only from here on
    y = torch.where(inside, y, y.new_zeros(()))
    x0, y0 = x.detach().floor(), y.detach().floor()
    fx, fy = x - x0, y - y0
    total = rows.new_zeros(())
    for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = (fy if dy else 1 - fy) * (fx if dx else 1 - fx)
        column, line = (x0 + dx).long(), (y0 + dy).long()
        present = (column >= 0) & (column < width) & (line >= 0) & (line < height)
        index = torch.where(present & inside, line * width + column, 0)
        index = index.permute(0, 3, 1, 2, 4).flatten(2)  # (N, G, Ho*Wo*K)
        weight, present = (tensor.permute(0, 3, 1, 2, 4).flatten(2)[..., None]
                           for tensor in (weight, present & inside))
        corner = rows.gather(2, index[..., None].expand(-1, -1, -1, rows.shape[-1]))
        # `where` on the pixel, not on the weight: 0 * NaN must leak into neither sum nor gradient
        total = total + weight * torch.where(present, corner, rows.new_zeros(()))
    return total
