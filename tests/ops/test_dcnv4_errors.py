# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Bad calls. One table is run against the Python checks and against the C++ checks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from helpers.bad_calls import (
    BOTH,
    GRAD_OUTPUT,
    arguments,
    assert_raises,
    backward,
    by_torch_ops,
    names,
)
from mmdcnv4.ops import DCNv4, dcnv4, dcnv4_reference

F32, F64, F16 = torch.float32, torch.float64, torch.float16

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
    ('offset_scale', dict(offset_scale=True), TypeError, 'must be a number, got True'),
    ('offset_scale', dict(offset_scale=np.ones(2)), TypeError, 'must be a number, got array'),
    ('offset_scale', dict(offset_scale=torch.ones(1)), TypeError, 'must be a number, got tensor'),
    ('softmax', dict(softmax='False'), TypeError, "must be True or False, got 'False'"),
    ('softmax', dict(softmax=2), TypeError, 'must be True or False, got 2'),
    ('remove_center', dict(remove_center=None), TypeError, 'must be True or False, got None'),
    ('value', dict(value=torch.zeros(2, 5, 7, 6).to_sparse()), TypeError,
     'must be a dense tensor, got a torch.sparse_coo one'),
    ('offset_mask', dict(offset_mask=torch.nested.nested_tensor(
        [torch.zeros(5, 7, 56)] * 2, layout=torch.jagged)), TypeError,
     'must be a dense tensor, got a nested one'),
    ('backend', dict(backend='cuda'), ValueError, "must be one of .*, got 'cuda'"),
]


def test_the_good_call():
    assert dcnv4(**arguments({})).shape == (2, 5, 7, 6)


@pytest.mark.parametrize('changes', [
    dict(groups=np.int64(2)), dict(kernel_size=np.int64(3)), dict(softmax=np.bool_(False)),
    dict(remove_center=0), dict(offset_scale=np.float32(1))], ids=str)
def test_numbers_of_numpy_are_numbers(changes):
    assert dcnv4(**arguments(changes)).shape == (2, 5, 7, 6)


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
@pytest.mark.parametrize('grad_output, exception, message', GRAD_OUTPUT)
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
    (dict(mask_init=None), TypeError, 'DCNv4: mask_init must be a number or one of .*, got None'),
    (dict(mask_init=math.inf), ValueError, 'DCNv4: mask_init must be finite, got inf'),
    (dict(softmax='False'), TypeError, "softmax must be True or False, got 'False'"),
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


def test_nothing_is_printed(native, capfd):
    with pytest.raises(ValueError, match='offset_mask must have shape'):
        torch.ops.mmdcnv4.dcnv4(torch.zeros(1, 5, 7, 4), torch.zeros(1, 5, 7, 40), [3, 3], 1,
                                [1, 1], [1, 1], [1, 1], 1.0, False, False)
    assert capfd.readouterr() == ('', '')
