# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""DCNv4 for `torch.onnx.export`: one `DeformConv` of ONNX (opset 19) per call.

With all weights 1 and a group for each channel, modulated deformable convolution (DCNv2,
arXiv:1811.11168) sums what DCNv4 sums, once the offsets are in its units and order: it knows no
`offset_scale`, has y before x, and takes its taps row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import _extension
from .contract import Geometry


def translation_table() -> dict[Callable, Callable]:
    """The `custom_translation_table` for `torch.onnx.export(..., dynamo=True)`.

    `opset_version` must be 19 or newer. Half types are computed in float32 and rounded once.

    Returns:
        The compiled operator, and the function that writes its nodes.

    Raises:
        ImportError: onnxscript is not installed, which that exporter needs; or the package has no
            compiled kernels, and with them no operator to translate.
        ValueError: from `torch.onnx.export`, as the cause of its own error: an older opset.

    Example:
        >>> import torch
        >>> from mmdcnv4.ops import DCNv4
        >>> from mmdcnv4.ops.onnx import translation_table
        >>> torch.onnx.export(DCNv4(64).eval(), (torch.randn(2, 14, 14, 64),), 'layer.onnx',
        ...                   dynamo=True, opset_version=20,
        ...                   custom_translation_table=translation_table())
    """
    if not _extension.is_available:
        raise ImportError('mmdcnv4.ops.onnx needs the compiled kernels: '
                          f'{_extension.missing_reason}')
    import onnxscript  # noqa: F401

    return {torch.ops.mmdcnv4.dcnv4.default: _write_nodes}


def _write_nodes(value: Any, offset_mask: Any, kernel_size: Any, groups: int, stride: Any,
                 padding: Any, dilation: Any, offset_scale: float, remove_center: bool,
                 softmax: bool) -> Any:
    """Nodes for a call of the operator, with the arguments of its schema."""
    from onnxscript import evaluator, ir, opset19

    op: Any = opset19  # its annotations know no tensors in the making
    version = getattr(evaluator.default(), 'opset', op).version  # of the exporter's recorder
    if version < 19:  # the file would be written, and no runtime could read it
        raise ValueError(f'dcnv4: opset_version must be 19 or newer (DeformConv), got {version}')
    size, stride, padding, dilation = ((int(height), int(width)) for height, width in
                                       (kernel_size, stride, padding, dilation))
    geometry = Geometry(size, groups, stride, padding, dilation, offset_scale, remove_center,
                        softmax)
    is_double = value.dtype == ir.DataType.DOUBLE
    number = ir.DataType.DOUBLE if is_double else ir.DataType.FLOAT  # to compute with

    def constant(numbers: list) -> Any:
        return op.Constant(value=ir.tensor(numbers, dtype=number))

    offset, mask = _unpack(op, constant, op.Cast(offset_mask, to=number), geometry)
    image = op.Transpose(op.Cast(value, to=number), perm=[0, 3, 1, 2])  # (N, C, H, W)
    channels = value.shape[3]
    weight = op.Expand(constant([1.0]), op.Constant(value_ints=[channels, 1, *size]))
    out = op.DeformConv(image, weight, offset, None, mask, group=channels, offset_group=groups,
                        kernel_shape=size, strides=stride, pads=[*padding, *padding],
                        dilations=dilation)
    return op.CastLike(op.Transpose(out, perm=[0, 2, 3, 1]), value)


def _unpack(op: Any, constant: Callable[[list], Any], offset_mask: Any,
            geometry: Geometry) -> tuple[Any, Any]:
    """Offsets (N, G * 2K, Ho, Wo) and masks (N, G * K, Ho, Wo) of `DeformConv`.

    Its position of a tap is `first + index * dilation + offset`, that of `dcnv4` is `first +
    center + (index * dilation - center + offset) * offset_scale`. With `remove_center` the middle
    tap gets a mask of zero.
    """
    groups, points, scale = geometry.groups, geometry.points, geometry.offset_scale
    height, width = geometry.kernel_size
    number_of = {tap: k for k, tap in enumerate(geometry.taps())}
    by_rows = [(j, i) for j in range(height) for i in range(width)]
    from_tap = [number_of.get(tap, 0) for tap in by_rows]  # any for the middle one that is left out

    def integers(*numbers: int) -> Any:
        return op.Constant(value_ints=numbers)

    used = op.Slice(offset_mask, integers(0), integers(groups * 3 * points), integers(3))
    packed = op.Reshape(used, integers(0, 0, 0, groups, 3 * points))
    at = [index for k in from_tap for index in (2 * k + 1, 2 * k)]  # y before x
    offset = op.Gather(packed, integers(*at), axis=4)
    if scale != 1:
        rest = [(scale - 1) * (index * geometry.dilation[axis] - geometry.center[axis])
                for tap in by_rows for axis, index in enumerate(tap)]
        offset = op.Add(op.Mul(offset, constant([scale])), constant(rest))
    mask = op.Gather(packed, integers(*range(2 * points, 3 * points)), axis=4)
    if geometry.softmax:
        mask = op.Softmax(mask, axis=-1)
    mask = op.Gather(mask, integers(*from_tap), axis=4)
    if geometry.remove_center:
        mask = op.Mul(mask, constant([float(tap in number_of) for tap in by_rows]))
    return tuple(op.Transpose(op.Reshape(tensor, integers(0, 0, 0, -1)), perm=[0, 3, 1, 2])
                 for tensor in (offset, mask))
