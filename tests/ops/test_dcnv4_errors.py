# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Bad calls. One table is run against the Python checks and against the C++ checks."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch

from mmdcnv4.ops import DCNv4, dcnv4, dcnv4_reference

CALL = dict(kernel_size=[3, 3], groups=2, stride=[1, 1], padding=[1, 1], dilation=[1, 1],
            offset_scale=1.0, remove_center=False, softmax=False)
F32, F64, F16 = torch.float32, torch.float64, torch.float16

# (argument that the message must name, what is different from a good call, exception, a part of
# the message)
BOTH = [
    ('value', dict(value=torch.zeros(5, 7, 6)), ValueError, 'must have 4 dimensions'),
    ('value', dict(value=torch.zeros(2, 0, 7, 6)), ValueError, 'must have at least one pixel'),
    ('value', dict(value=torch.zeros(2, 5, 0, 6)), ValueError, 'must have at least one pixel'),
    ('value', dict(value=torch.zeros(2, 5, 7, 6, dtype=torch.int64)), TypeError, 'must be float64'),
    ('value', dict(value=torch.zeros(2, 5, 7, 6, dtype=torch.complex64)), TypeError,
     'must be float64'),
    ('value', dict(value=torch.zeros(2, 5, 7, 6, dtype=torch.bool)), TypeError, 'must be float64'),
    ('groups', dict(value=torch.zeros(2, 5, 7, 0)), ValueError, r'channels of value \(0\), got 2'),
    ('groups', dict(groups=4), ValueError, r'must divide the channels of value \(6\), got 4'),
    ('groups', dict(groups=0), ValueError, 'must be >= 1, got 0'),
    ('groups', dict(groups=-2), ValueError, 'must be >= 1, got -2'),
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

# what only Python can see: the dispatcher refuses or converts these by itself
PYTHON_ONLY = [
    ('value', dict(value=np.zeros((2, 5, 7, 6), np.float32)), TypeError, 'got ndarray'),
    ('value', dict(value=None), TypeError, 'got NoneType'),
    ('offset_mask', dict(offset_mask=[1, 2]), TypeError, 'got list'),
    ('kernel_size', dict(kernel_size='3'), TypeError, 'int or a pair'),
    ('kernel_size', dict(kernel_size=(3., 3.)), TypeError, 'of ints'),
    ('kernel_size', dict(kernel_size=True), TypeError, 'int or a pair'),
    ('stride', dict(stride=None), TypeError, 'int or a pair'),
    ('groups', dict(groups=2.0), TypeError, 'must be an int, got 2.0'),
    ('groups', dict(groups=True), TypeError, 'must be an int, got True'),
    ('offset_scale', dict(offset_scale='1'), TypeError, "must be a number, got '1'"),
    ('backend', dict(backend='cuda'), ValueError, "must be one of .*, got 'cuda'"),
]


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


def test_the_good_call():
    assert dcnv4(**arguments({})).shape == (2, 5, 7, 6)


def test_the_good_call_natively(native):
    assert by_torch_ops(**arguments({})).shape == (2, 5, 7, 6)
    assert [grad.shape[3] for grad in backward(**arguments({}))] == [6, 56]


@pytest.mark.hostile
@pytest.mark.parametrize('argument, changes, exception, message', BOTH + PYTHON_ONLY,
                         ids=names(BOTH + PYTHON_ONLY))
def test_python(argument, changes, exception, message):
    assert_raises(dcnv4, changes, argument, exception, message)


@pytest.mark.parametrize('argument, changes, exception, message',
                         [row for row in BOTH if row[0] != 'backend'], ids=names(BOTH))
def test_reference(argument, changes, exception, message):
    assert_raises(dcnv4_reference, changes, argument, exception, message)


@pytest.mark.hostile
@pytest.mark.parametrize('argument, changes, exception, message', BOTH, ids=names(BOTH))
def test_cpp(native, argument, changes, exception, message):
    assert_raises(by_torch_ops, changes, argument, exception, message)


@pytest.mark.hostile
@pytest.mark.parametrize('argument, changes, exception, message', BOTH, ids=names(BOTH))
def test_cpp_backward(native, argument, changes, exception, message):
    assert_raises(backward, changes, argument, exception, message)


@pytest.mark.hostile
@pytest.mark.parametrize('grad_output, exception, message', [
    (torch.zeros(2, 5, 7, 5), ValueError, r'must have shape \[2, 5, 7, 6\], got \[2, 5, 7, 5\]'),
    (torch.zeros(2, 5, 7, 56), ValueError, 'must have shape'),
    (torch.zeros(2, 6, 7, 6), ValueError, 'must have shape'),
    (torch.zeros(1, 5, 7, 6), ValueError, 'must have shape'),
    (torch.zeros(()), ValueError, 'must have shape'),
    (torch.zeros(2, 5, 7, 6, dtype=F64), TypeError, 'must have the dtype of value'),
    (torch.zeros(2, 5, 7, 6, dtype=F16), TypeError, 'must have the dtype of value')])
def test_grad_output(native, grad_output, exception, message):
    assert_raises(backward, dict(grad_output=grad_output), 'grad_output', exception, message)


@pytest.mark.hostile
def test_an_offset_mask_narrower_than_value_is_for_python_alone(native):
    """`dcnv4` widens it without loss; the operator behind it wants the rule to hold."""
    for value_dtype, dtype in ((F64, F32), (F64, F16), (F32, F16), (F32, torch.bfloat16)):
        changes = dict(value=torch.zeros(2, 5, 7, 6, dtype=value_dtype),
                       offset_mask=torch.zeros(2, 5, 7, 56, dtype=dtype))
        assert dcnv4(**arguments(changes)).dtype == value_dtype
        assert_raises(by_torch_ops, changes, 'offset_mask', TypeError, 'dtype of value')


@pytest.mark.hostile
def test_sides_beyond_32_bit_coordinates(native):
    value = torch.zeros(1, 1, 1, 6).expand(1, 1, 2**30 + 1, 6)
    assert_raises(by_torch_ops, dict(value=value), 'value', ValueError, 'sides <= 1073741824')


def test_unknown_arguments():
    with pytest.raises(TypeError, match='deform_groups'):
        dcnv4(**arguments(dict(deform_groups=2)))
    with pytest.raises(TypeError, match='positional'):
        dcnv4(torch.zeros(2, 5, 7, 6), torch.zeros(2, 5, 7, 56), 3, 2)


@pytest.mark.parametrize('options, exception, message', [
    (dict(channels=0), ValueError, 'DCNv4: channels must be >= 1, got 0'),
    (dict(channels='32'), TypeError, "DCNv4: channels must be an int, got '32'"),
    (dict(channels=32.0), TypeError, 'DCNv4: channels must be an int, got 32.0'),
    (dict(in_channels=1.5), TypeError, 'DCNv4: in_channels must be an int, got 1.5'),
    (dict(group=0), ValueError, 'DCNv4: group must be >= 1, got 0'),
    (dict(group=2.0), TypeError, 'DCNv4: group must be an int, got 2.0'),
    (dict(mask_init=None), TypeError, 'DCNv4: mask_init must be a number, got None'),
    (dict(dw_kernel_size=3.0), TypeError, 'DCNv4: dw_kernel_size must be an int, got 3.0'),
    (dict(dw_kernel_size=True), TypeError, 'DCNv4: dw_kernel_size must be an int, got True'),
    (dict(in_channels=-1), ValueError, 'in_channels must be >= 1'),
    (dict(channels=62), ValueError, r'group must divide channels \(62\), got 4'),
    (dict(kernel_size=0), ValueError, 'kernel_size must be >= 1'),
    (dict(stride=0), ValueError, 'stride must be >= 1'),
    (dict(pad=-1), ValueError, 'pad.* must be >= 0'),
    (dict(dilation=(1, 0)), ValueError, 'dilation must be >= 1'),
    (dict(offset_scale=math.inf), ValueError, 'offset_scale must be finite'),
    (dict(dw_kernel_size=4), ValueError, 'dw_kernel_size must be odd.*got 4'),
    (dict(dw_kernel_size=-3), ValueError, 'dw_kernel_size must be >= 1, got -3'),
    (dict(kernel_size=1, pad=0, remove_center=True), ValueError, 'remove_center must be False'),
    (dict(without_pointwise=True, in_channels=32), ValueError,
     r'in_channels must equal channels \(64\) with without_pointwise=True, got 32'),
    (dict(center_feature_scale=True, stride=2), ValueError, 'output of the size of the input'),
    (dict(center_feature_scale=True, pad=0), ValueError, 'output of the size of the input'),
    (dict(kernel=3), TypeError, 'kernel')])
def test_module(options, exception, message):
    with pytest.raises(exception, match=message):
        DCNv4(**options)


@pytest.mark.parametrize('shape', [(2, 35, 8), (2, 5, 7, 16), (2, 8, 5, 7), (5, 7, 8)])
def test_module_input(shape):
    """A token grid is never guessed to be square: the layer takes maps alone."""
    with pytest.raises(ValueError, match=r'x must have shape \(N, H, W, 8\), got '):
        DCNv4(8, group=2)(torch.zeros(shape))
