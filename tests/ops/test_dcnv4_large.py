# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Tensors of more than 2^31 elements: kernels count in 64 bits. Little of the memory is touched."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmdcnv4.ops import dcnv4, dcnv4_reference
from mmdcnv4.testing import Inputs, assert_accurate, assert_within, error_bounds

BEYOND = 2**31

pytestmark = pytest.mark.usefixtures('native')


def lazily_zero(*shape):
    """A tensor of zeros whose memory is used only where it is touched."""
    try:
        return torch.from_numpy(np.zeros(shape, np.float32))
    except MemoryError:
        pytest.skip(f'no {4 * math.prod(shape) / 2**30:.0f} GiB of address space')


def four_corners(height, width, channels):
    """A huge image with numbers in its corners alone, and the windows that see them.

    With stride (height - 3, width - 3) a 3 x 3 kernel has 2 x 2 windows, one in every corner.
    """
    value = lazily_zero(1, height, width, channels)
    for rows in (slice(0, 3), slice(height - 3, height)):
        for columns in (slice(0, 3), slice(width - 3, width)):
            value[:, rows, columns] = torch.randn(1, 3, 3, channels)
    # quarters are exact in float32 even at column 32768
    offset_mask = torch.randint(-3, 4, (1, 2, 2, 32)) / 4
    options = dict(kernel_size=3, groups=1, stride=(height - 3, width - 3))
    corners = torch.cat([torch.cat([value[:, r, c] for c in (slice(0, 3), slice(-3, None))], 2)
                         for r in (slice(0, 3), slice(-3, None))], 1)
    return value, offset_mask, options, corners


def windows_of_corners(offset_mask, corners):
    """Each corner alone; quarters and whole taps stay within it or its zeros."""
    for row in (0, 1):
        for column in (0, 1):
            at = slice(row, row + 1), slice(column, column + 1)
            window = corners[:, 3 * row:3 * row + 3, 3 * column:3 * column + 3]
            yield at, Inputs(window, offset_mask[:, at[0], at[1]])


def test_more_than_2_to_the_31_numbers_in_an_image(instruction_set):
    """Kernels with 64-bit element offsets; the memory is virtual, a few pages are touched."""
    value, offset_mask, options, corners = four_corners(32769, 1025, 64)
    assert value.numel() > BEYOND
    out = dcnv4(value, offset_mask, **options)
    options = dict(kernel_size=3, groups=1)
    for at, inputs in windows_of_corners(offset_mask, corners):
        exact = dcnv4_reference(inputs.value.double(), inputs.offset_mask.double(), **options)
        bound = error_bounds(inputs, out[:, at[0], at[1]], **options)[0]
        assert_within(out[:, at[0], at[1]], exact, bound)


def test_more_than_2_to_the_31_numbers_in_a_batch():
    value = lazily_zero(257, 1024, 128, 64)
    assert value.numel() > BEYOND and value[0].numel() < BEYOND
    value[256, 1023, 127], value[0, 0, 0] = torch.randn(64), torch.randn(64)
    offset_mask = torch.zeros(257, 2, 2, 8)
    offset_mask[..., 2] = 1
    out = dcnv4(value, offset_mask, kernel_size=1, groups=1, stride=(1023, 127))
    assert torch.equal(out[256, 1, 1], value[256, 1023, 127])
    assert torch.equal(out[0, 0, 0], value[0, 0, 0])
    assert out.count_nonzero() == 128


@pytest.mark.slow
def test_backward_with_more_than_2_to_the_31_numbers():
    """The gradient of `value` is written whole: this needs 9 GiB of memory."""
    value, offset_mask, options, corners = four_corners(32769, 1025, 64)
    grad_output = torch.randn(1, 2, 2, 64)
    grad_value, grad = torch.ops.mmdcnv4._dcnv4_backward(
        grad_output, value, offset_mask, [3, 3], 1, options['stride'], [0, 0], [1, 1], 1.0, False,
        False)
    for at, inputs in windows_of_corners(offset_mask, corners):
        inner = grad_value[:, -3 * at[0].start:, -3 * at[1].start:][:, :3, :3]
        assert_accurate([None, inner, grad[:, at[0], at[1]]], inputs, grad_output[:, at[0], at[1]],
                        kernel_size=3, groups=1)
