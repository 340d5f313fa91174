# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The table of bad calls: every rule of the contract, broken at least once."""

from __future__ import annotations

import math
import re

import pytest
import torch

CALL = dict(kernel_size=[3, 3], groups=2, stride=[1, 1], padding=[1, 1], dilation=[1, 1],
            offset_scale=1.0, remove_center=False, softmax=False)
F32, F64, F16 = torch.float32, torch.float64, torch.float16

# (argument that the message must name, what is different from a good call, exception, a part of
# the message)
BOTH = [
    ('value', dict(value=torch.zeros(5, 7, 6)), ValueError, 'must have 4 dimensions'),
    ('value', dict(value=torch.zeros(2, 0, 7, 6)), ValueError, 'must have at least one pixel'),
    ('value', dict(value=torch.zeros(2, 5, 0, 6)), ValueError, 'must have at least one pixel'),
    ('value', dict(value=torch.zeros(1, 1, 1, 6).expand(1, 1, 2**30 + 1, 6)), ValueError,
     'must have sides <= 1073741824, got shape .1, 1, 1073741825, 6.'),
    ('value', dict(value=torch.zeros(1, 1, 1, 6).expand(1, 2**31, 1, 6)), ValueError,
     'must have sides <= 1073741824'),
    ('value', dict(value=torch.zeros(2, 5, 7, 6, dtype=torch.int64)), TypeError, 'must be float64'),
    ('value', dict(value=torch.zeros(2, 5, 7, 6, dtype=torch.complex64)), TypeError,
     'must be float64'),
    ('value', dict(value=torch.zeros(2, 5, 7, 6, dtype=torch.bool)), TypeError, 'must be float64'),
    ('groups', dict(value=torch.zeros(2, 5, 7, 0)), ValueError, r'channels of value \(0\), got 2'),
    ('groups', dict(groups=4), ValueError, r'must divide the channels of value \(6\), got 4'),
    ('groups', dict(groups=0), ValueError, 'must be >= 1, got 0'),
    ('groups', dict(groups=-2), ValueError, 'must be >= 1, got -2'),
    ('groups', dict(groups=2**30 + 1), ValueError, 'must be <= 1073741824, got 1073741825'),
    ('offset_mask', dict(offset_mask=torch.zeros(2, 5, 7, 54)), ValueError,
     r'shape .2, 5, 7, 56. = .N, Ho, Wo, groups \* 3K rounded up to 8., got .2, 5, 7, 54'),
    ('offset_mask', dict(offset_mask=torch.zeros(2, 5, 6, 56)), ValueError, 'must have shape'),
    ('offset_mask', dict(offset_mask=torch.zeros(2, 4, 7, 56)), ValueError, 'must have shape'),
    ('offset_mask', dict(offset_mask=torch.zeros(1, 5, 7, 56)), ValueError, 'must have shape'),
    ('offset_mask', dict(offset_mask=torch.zeros(2, 35, 56)), ValueError, 'must have shape'),
    ('offset_mask', dict(offset_mask=torch.zeros(2, 5, 7, 56, dtype=F64)), TypeError,
     'must have the dtype of value'),
    ('offset_mask', dict(offset_mask=torch.zeros(2, 5, 7, 56, dtype=torch.int32)), TypeError,
     'must have the dtype of value'),
    ('offset_mask', dict(value=torch.zeros(2, 5, 7, 6, dtype=F16),
                         offset_mask=torch.zeros(2, 5, 7, 56, dtype=torch.bfloat16)), TypeError,
     'float32 beside a half-precision value'),
    ('offset_mask', dict(offset_mask=torch.zeros(2, 5, 7, 56, device='meta')), ValueError,
     r'must be on the device of value \(cpu\), got meta'),
    ('offset_mask', dict(value=torch.zeros(2, 5, 7, 6, device='meta')), ValueError,
     r'must be on the device of value \(meta\), got cpu'),
    ('offset_mask', dict(remove_center=True), ValueError, 'must have shape .2, 5, 7, 48.'),
    ('offset_mask', dict(stride=[2, 1]), ValueError, 'must have shape .2, 3, 7, 56.'),
    ('kernel_size', dict(kernel_size=[0, 3]), ValueError, r'must be >= 1, got \(0, 3\)'),
    ('kernel_size', dict(kernel_size=[3, -1]), ValueError, 'must be >= 1'),
    ('kernel_size', dict(kernel_size=[3, 1025]), ValueError, r'must be <= 1024, got \(3, 1025\)'),
    ('kernel_size', dict(kernel_size=[2**31, 2**31]), ValueError, 'must be <= '),
    ('kernel_size', dict(kernel_size=[9, 3]), ValueError,
     'the kernel spans 9 pixels of height, the padded map has 7'),
    ('kernel_size', dict(dilation=[1, 5]), ValueError,
     'the kernel spans 11 pixels of width, the padded map has 9'),
    ('kernel_size', dict(kernel_size=[3, 3, 3]), (TypeError, ValueError), 'pair'),
    ('stride', dict(stride=[0, 1]), ValueError, r'must be >= 1, got \(0, 1\)'),
    ('stride', dict(stride=[1, 2**31]), ValueError, 'must be <= 1073741824'),
    ('padding', dict(padding=[1, -1]), ValueError, r'must be >= 0, got \(1, -1\)'),
    ('padding', dict(padding=[2**40, 1]), ValueError, 'must be <= 1073741824'),
    ('dilation', dict(dilation=[1, 0]), ValueError, 'must be >= 1'),
    ('dilation', dict(dilation=[2**62, 1]), ValueError, 'must be <= 1073741824'),
    ('offset_scale', dict(offset_scale=math.nan), ValueError, 'must be finite, got nan'),
    ('offset_scale', dict(offset_scale=-math.inf), ValueError, 'must be finite, got -inf'),
    ('remove_center', dict(kernel_size=[3, 4], remove_center=True), ValueError,
     'a kernel_size with an even side'),
    ('remove_center', dict(kernel_size=[1, 1], remove_center=True), ValueError,
     'would keep no tap'),
]

GRAD_OUTPUT = [
    (torch.zeros(2, 5, 7, 5), ValueError,
     r'must have shape .2, 5, 7, 6., got .2, 5, 7, 5.'),
    (torch.zeros(2, 5, 7, 56), ValueError, 'must have shape'),
    (torch.zeros(2, 6, 7, 6), ValueError, 'must have shape'),
    (torch.zeros(1, 5, 7, 6), ValueError, 'must have shape'),
    (torch.zeros(()), ValueError, 'must have shape'),
    (torch.zeros(2, 5, 7, 6, dtype=F64), TypeError, 'must have the dtype of value'),
    (torch.zeros(2, 5, 7, 6, dtype=F16), TypeError, 'must have the dtype of value'),
    (torch.zeros(2, 5, 7, 6, device='meta'), ValueError,
     r'must be on the device of value \(cpu\), got meta')]


def names(rows):
    return [f'{row[0]}-{number}' for number, row in enumerate(rows)]


def arguments(changes):
    tensors = dict(value=torch.zeros(2, 5, 7, 6), offset_mask=torch.zeros(2, 5, 7, 56))
    return {**tensors, **CALL, **changes}


def by_torch_ops(value, offset_mask, **scalars):
    return torch.ops.mmdcnv4.dcnv4(value, offset_mask, *scalars.values())


def backward(value, offset_mask, grad_output=None, **scalars):
    shape = (*offset_mask.shape[:3], 6)
    grad_output = torch.zeros(shape, dtype=value.dtype) if grad_output is None else grad_output
    return torch.ops.mmdcnv4._dcnv4_backward(grad_output, value, offset_mask, *scalars.values())


def assert_raises(function, changes, argument, exception, message):
    with pytest.raises(exception, match=message) as caught:
        function(**arguments(changes))
    assert re.match(rf'dcnv4: {argument} must ', str(caught.value)), caught.value
