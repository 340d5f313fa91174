# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Shape and range rules of the DCNv4 operator, written once for all of its Python users.

`csrc/dcnv4_check.cpp` states the same rules, in the same order and words, for the compiled kernels.
`tests/ops/test_dcnv4_contract.py` compares the two, rule by rule and call by call.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import NamedTuple, Union

import torch
from torch import Tensor

Pair = tuple[int, int]
IntOrPair = Union[int, Sequence[int]]

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
HALF_DTYPES = (torch.float16, torch.bfloat16)
# A kernel axis larger than this is a mistake in the call, and would overflow the 32-bit tap index.
MAX_KERNEL = 1024
# Pixel coordinates are 32-bit in the kernels. More groups than that would overflow the 64-bit
# number of channels of `offset_mask`.
MAX_SIDE = 2**30


class Geometry(NamedTuple):
    """Geometry of one call, every pair in (height, width) order.

    The fields are the scalars of the operator's schema, in its order.

    Attributes:
        kernel_size, stride, padding, dilation: in input pixels.
        groups: number of channel groups, each with its own offsets and masks.
        offset_scale: factor on the kernel grid and on the learned offsets.
        remove_center: whether the middle tap of an odd kernel is left out.
        softmax: whether the masks of a group are normalised over its taps.
    """

    kernel_size: Pair
    groups: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    offset_scale: float = 1.0
    remove_center: bool = False
    softmax: bool = False

    @property
    def points(self) -> int:
        """Taps per group."""
        return self.kernel_size[0] * self.kernel_size[1] - int(self.remove_center)

    @property
    def center(self) -> Pair:
        """Distance (y, x) in pixels from the first tap of the unscaled kernel to its middle."""
        return (self.dilation[0] * (self.kernel_size[0] - 1) // 2,
                self.dilation[1] * (self.kernel_size[1] - 1) // 2)

    def taps(self) -> list[Pair]:
        """(y, x) index of every tap, column by column: x is the outer loop."""
        kernel_h, kernel_w = self.kernel_size
        taps = [(j, i) for i in range(kernel_w) for j in range(kernel_h)]
        if self.remove_center:
            taps.remove((kernel_h // 2, kernel_w // 2))
        return taps


def pair(value: IntOrPair, name: str, minimum: int) -> Pair:
    """Turns an int or a sequence of two ints into a pair and checks its bounds.

    Raises:
        TypeError: not an int and not a pair of ints.
        ValueError: an element is below `minimum` or above `MAX_SIDE`.
    """
    # tuple and list first: the check against Sequence alone takes longer
    items = tuple(value) if isinstance(value, (tuple, list, Sequence)) else (value, value)
    if len(items) != 2 or any(isinstance(item, bool) for item in items):
        raise TypeError(f'dcnv4: {name} must be an int or a pair (height, width), got {value!r}')
    try:
        height, width = operator.index(items[0]), operator.index(items[1])
    except TypeError:
        raise TypeError(f'dcnv4: {name} must be an int or a pair (height, width) of ints, '
                        f'got {value!r}') from None
    if height < minimum or width < minimum:
        raise ValueError(f'dcnv4: {name} must be >= {minimum}, got ({height}, {width})')
    if height > MAX_SIDE or width > MAX_SIDE:
        raise ValueError(f'dcnv4: {name} must be <= {MAX_SIDE}, got ({height}, {width})')
    return height, width


def _is_int(value: object) -> bool:
    """Whether it is an integer, of NumPy as well; True and False are not."""
    try:
        operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return False
    return not isinstance(value, bool)


def flag(value: bool, name: str) -> bool:
    """Checks a switch: True or False, of NumPy as well, 1 or 0; the text 'False' would be true.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, bool):
        return value
    if type(value).__name__ not in ('bool', 'bool_', 'int') or value not in (0, 1):
        raise TypeError(f'dcnv4: {name} must be True or False, got {value!r}')
    return bool(value)


def make_geometry(*, kernel_size: IntOrPair, groups: int, stride: IntOrPair = 1,
                  padding: IntOrPair = 0, dilation: IntOrPair = 1, offset_scale: float = 1.0,
                  remove_center: bool = False, softmax: bool = False) -> Geometry:
    """Checks everything that can be checked without the tensors.

    Raises:
        TypeError, ValueError: the message names the argument, the rule and the value.
    """
    kernel_size = pair(kernel_size, 'kernel_size', 1)
    if max(kernel_size) > MAX_KERNEL:
        raise ValueError(f'dcnv4: kernel_size must be <= {MAX_KERNEL}, got {kernel_size}')
    if not _is_int(groups):
        raise TypeError(f'dcnv4: groups must be an int, got {groups!r}')
    groups = operator.index(groups)
    if groups < 1:
        raise ValueError(f'dcnv4: groups must be >= 1, got {groups}')
    if groups > MAX_SIDE:
        raise ValueError(f'dcnv4: groups must be <= {MAX_SIDE}, got {groups}')
    stride, padding = pair(stride, 'stride', 1), pair(padding, 'padding', 0)
    dilation = pair(dilation, 'dilation', 1)
    is_number, is_finite = not isinstance(offset_scale, (bool, Tensor)), False
    try:  # not math.isfinite, which torch.compile cannot trace with a symbolic float
        is_finite = is_number and -math.inf < offset_scale < math.inf
    except (TypeError, ValueError):  # an array of several numbers has no order
        is_number = False
    if not is_number:
        raise TypeError(f'dcnv4: offset_scale must be a number, got {offset_scale!r}')
    if not is_finite:
        raise ValueError(f'dcnv4: offset_scale must be finite, got {offset_scale}')
    remove_center, softmax = flag(remove_center, 'remove_center'), flag(softmax, 'softmax')
    if remove_center and (kernel_size[0] % 2 == 0 or kernel_size[1] % 2 == 0):
        raise ValueError('dcnv4: remove_center must be False for a kernel_size with an even side, '
                         f'which has no centre, got kernel_size {kernel_size}')
    if remove_center and kernel_size == (1, 1):
        raise ValueError('dcnv4: remove_center must be False for kernel_size (1, 1), '
                         'which would keep no tap')
    return Geometry(kernel_size, groups, stride, padding, dilation, float(offset_scale),
                    remove_center, softmax)


def offset_mask_channels(groups: int, points: int) -> int:
    """Length P of the last axis of `offset_mask`: 3 * points * groups, rounded up to 8."""
    return -(-3 * points * groups // 8) * 8


def output_size(height: int, width: int, geometry: Geometry) -> Pair:
    """(Ho, Wo) of the output map, as for an ordinary convolution.

    Raises:
        ValueError: the kernel does not fit into the padded map.
    """
    sizes = []
    for axis, size, name in ((0, height, 'height'), (1, width, 'width')):
        reach = geometry.dilation[axis] * (geometry.kernel_size[axis] - 1) + 1
        room = size + 2 * geometry.padding[axis]
        if room < reach:
            raise ValueError(f'dcnv4: kernel_size must fit into the padded map: the kernel spans '
                             f'{reach} pixels of {name}, the padded map has {room}')
        sizes.append((room - reach) // geometry.stride[axis] + 1)
    return sizes[0], sizes[1]


def check_types(value: Tensor, offset_mask: Tensor) -> None:
    """Both are dense tensors.

    Raises:
        TypeError: one is something else, a NumPy array or a sparse tensor for instance.
    """
    for name, tensor in (('value', value), ('offset_mask', offset_mask)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f'dcnv4: {name} must be a torch.Tensor, got {type(tensor).__name__}')
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized:
            kind = ('a nested' if tensor.is_nested else 'a quantized' if tensor.is_quantized
                    else f'a {tensor.layout}')
            raise TypeError(f'dcnv4: {name} must be a dense tensor, got {kind} one')


def check_dtypes(value: Tensor, offset_mask: Tensor) -> None:
    """Dtype and device rules.

    Raises:
        TypeError: a dtype is not supported, or `offset_mask` is neither of the dtype of `value`
            nor float32 with a half-precision `value`.
        ValueError: the tensors are on different devices.
    """
    if value.dtype not in FLOAT_DTYPES:
        raise TypeError('dcnv4: value must be float64, float32, float16 or bfloat16, '
                        f'got {value.dtype}')
    mixed = value.dtype in HALF_DTYPES and offset_mask.dtype == torch.float32
    if offset_mask.dtype != value.dtype and not mixed:
        raise TypeError(f'dcnv4: offset_mask must have the dtype of value ({value.dtype}), or be '
                        f'float32 beside a half-precision value, got {offset_mask.dtype}')
    if offset_mask.device != value.device:
        raise ValueError(f'dcnv4: offset_mask must be on the device of value ({value.device}), '
                         f'got {offset_mask.device}')


def check_tensors(value: Tensor, offset_mask: Tensor, geometry: Geometry) -> Pair:
    """Checks the tensors against the geometry and returns (Ho, Wo).

    Args:
        value: (N, H, W, C).
        offset_mask: (N, Ho, Wo, P).
        geometry: of the call.

    Raises:
        TypeError, ValueError: the message names the argument, the rule and the value.
    """
    check_types(value, offset_mask)
    check_dtypes(value, offset_mask)
    if value.dim() != 4:
        raise ValueError('dcnv4: value must have 4 dimensions (N, H, W, C), '
                         f'got shape {tuple(value.shape)}')
    batch, height, width, channels = value.shape
    if height == 0 or width == 0:
        raise ValueError('dcnv4: value must have at least one pixel, '
                         f'got shape {tuple(value.shape)}')
    # Symbolic sizes are left to the kernel: asked here, the question would become a condition of
    # the graph, and torch.export refuses dimensions without an upper bound then.
    if not torch.compiler.is_dynamo_compiling() and any(
            isinstance(size, int) and size > MAX_SIDE for size in (height, width)):
        raise ValueError(f'dcnv4: value must have sides <= {MAX_SIDE}, '
                         f'got shape {tuple(value.shape)}')
    if channels == 0 or channels % geometry.groups != 0:
        raise ValueError('dcnv4: groups must divide the channels of value '
                         f'({channels}), got {geometry.groups}')
    out_h, out_w = output_size(height, width, geometry)
    expected = (batch, out_h, out_w, offset_mask_channels(geometry.groups, geometry.points))
    if tuple(offset_mask.shape) != expected:
        raise ValueError(
            f'dcnv4: offset_mask must have shape {expected} = (N, Ho, Wo, groups * 3K rounded up '
            f'to 8), got {tuple(offset_mask.shape)}')
    return out_h, out_w


def check_grad_output(grad_output: Tensor, value: Tensor, output: Pair) -> None:
    """Checks the gradient of the output, of which `output` is (Ho, Wo).

    Raises:
        TypeError, ValueError: the message names the argument, the rule and the value.
    """
    expected = (value.shape[0], *output, value.shape[3])
    if tuple(grad_output.shape) != expected:
        raise ValueError(f'dcnv4: grad_output must have shape {expected}, '
                         f'got {tuple(grad_output.shape)}')
    if grad_output.dtype != value.dtype:
        raise TypeError(f'dcnv4: grad_output must have the dtype of value ({value.dtype}), '
                        f'got {grad_output.dtype}')
    if grad_output.device != value.device:
        raise ValueError('dcnv4: grad_output must be on the device of value '
                         f'({value.device}), got {grad_output.device}')
