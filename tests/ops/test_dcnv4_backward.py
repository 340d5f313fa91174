# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Gradients of the compiled kernels, against the reference and golden numbers."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mmdcnv4.ops import dcnv4, dcnv4_reference
from mmdcnv4.testing import (
    GEOMETRIES,
    UNIT_ROUNDOFF,
    Inputs,
    assert_matches_reference,
    assert_within,
    cpu_threads,
    error_bounds,
    forward_backward,
    make_inputs,
)

GOLDEN = Path(__file__).parents[1] / 'data' / 'dcnv4_op.npz'
SAME = dict(kernel_size=3, padding=1)
DTYPES = [(torch.float64, torch.float64), (torch.float32, torch.float32),
          (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
          (torch.float16, torch.float32), (torch.bfloat16, torch.float32)]
SHORT = {torch.float64: 'f64', torch.float32: 'f32', torch.float16: 'f16', torch.bfloat16: 'bf16'}
native = functools.partial(dcnv4, backend='native')


def dtype_name(dtype):
    return SHORT[dtype]


def output_shape(inputs):
    return (*inputs.offset_mask.shape[:3], inputs.value.shape[3])


def gradients(inputs, grad_output, **geometry):
    return forward_backward(native, inputs, grad_output, **geometry)[1:]


@pytest.mark.parametrize('value_dtype, mask_dtype', DTYPES, ids=dtype_name)
@pytest.mark.parametrize('name', GEOMETRIES)
def test_geometries(instruction_set, name, value_dtype, mask_dtype):
    geometry = dict(groups=5, **GEOMETRIES[name])
    inputs = make_inputs(2, 9, 5, 6, dtype=value_dtype, mask_dtype=mask_dtype, **geometry)
    assert_matches_reference(native, inputs, **geometry)
    for tensor, grad in zip(inputs, gradients(inputs, torch.ones(output_shape(inputs)),
                                              **geometry)):
        assert grad.dtype == tensor.dtype


@pytest.mark.parametrize('groups, group_channels', [
    (1, 1), (5, 3), (7, 8), (20, 10), (1, 16), (5, 20), (7, 32), (20, 48), (1, 64), (5, 70),
    (3, 129)])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=dtype_name)
def test_widths(instruction_set, groups, group_channels, dtype):
    geometry = dict(groups=groups, **GEOMETRIES['3x3-strided'])
    inputs = make_inputs(2, 3, 5, group_channels, dtype=dtype, **geometry)
    assert_matches_reference(native, inputs, **geometry)


@pytest.mark.parametrize('kernel_size', [7, 11, (1, 16), (13, 12)])
def test_many_taps(instruction_set, kernel_size):
    geometry = dict(groups=3, kernel_size=kernel_size, padding=6, softmax=True, stride=(3, 2))
    inputs = make_inputs(1, 9, 7, 10, dtype=torch.float32, reach=8, **geometry)
    assert_matches_reference(native, inputs, **geometry)


@pytest.mark.parametrize('width', [1, 15, 16, 17, 33, 145])
def test_rows_of_any_length(instruction_set, width):
    geometry = dict(groups=2, **SAME)
    inputs = make_inputs(2, 2, width, 4, dtype=torch.float32, **geometry)
    assert_matches_reference(native, inputs, **geometry)


@pytest.mark.parametrize('shape, groups', [
    ((257, 2, 3, 4), 2), ((2, 3, 3, 16), 80), ((1, 1, 1, 16), 4), ((5, 7, 11, 16), 4)],
    ids=['batch-257', '80-groups', 'one-query', 'queries-without-a-divisor'])
def test_limits_of_the_released_kernel(instruction_set, shape, groups):
    geometry = dict(groups=groups, **SAME)
    assert_matches_reference(native, make_inputs(*shape, dtype=torch.float32, **geometry),
                             **geometry)


def test_empty_batch(instruction_set):
    value = torch.empty(0, 5, 7, 6, requires_grad=True)
    offset_mask = torch.empty(0, 5, 7, 56, requires_grad=True)
    native(value, offset_mask, groups=2, **SAME).sum().backward()
    assert value.grad.shape == value.shape
    assert offset_mask.grad.shape == offset_mask.shape


def test_only_one_input_needs_a_gradient(instruction_set):
    geometry = dict(groups=2, **SAME)
    inputs = make_inputs(2, 5, 7, 6, dtype=torch.float32, **geometry)
    grad_output = torch.randn(output_shape(inputs))
    expected = gradients(inputs, grad_output, **geometry)
    for wanted in (0, 1):
        tensors = [tensor.clone().requires_grad_(i == wanted) for i, tensor in enumerate(inputs)]
        native(*tensors, **geometry).backward(grad_output)
        assert torch.equal(tensors[wanted].grad, expected[wanted])
        assert tensors[1 - wanted].grad is None


@pytest.mark.parametrize('case', range(6))
def test_golden(instruction_set, case):
    """Gradients of an independent float64 implementation, stored in float32."""
    with np.load(GOLDEN) as golden:
        options = json.loads(str(golden['cases']))[case]
        names = ('value', 'offset_mask', 'grad_output', 'grad_value', 'grad_offset_mask')
        value, offset_mask, grad_output, *expected = (torch.from_numpy(golden[f'{name}{case}'])
                                                      for name in names)
    options.pop('group_channels')
    options['groups'] = options.pop('group')
    value.requires_grad_(), offset_mask.requires_grad_()
    out = native(value, offset_mask, **options)
    actual = torch.autograd.grad(out, (value, offset_mask), grad_output)
    bounds = error_bounds(Inputs(value, offset_mask), grad_output, **options)[1:]
    for grad, wanted, bound in zip(actual, expected, bounds):
        rounding = UNIT_ROUNDOFF[torch.float32] * wanted.abs()
        assert_within(grad, wanted.double(), bound + rounding)


@pytest.mark.parametrize('name', ['3x3', '3x5-ring', '3x3-softmax'])
def test_gradcheck(instruction_set, name):
    geometry = dict(groups=2, **GEOMETRIES[name])
    inputs = make_inputs(2, 5, 4, 3, **geometry)
    assert torch.autograd.gradcheck(lambda *tensors: native(*tensors, **geometry),
                                    tuple(inputs.leaves(torch.float64, torch.float64)),
                                    fast_mode=True)


@pytest.mark.hostile
def test_padding_channels_get_zero(instruction_set):
    geometry = dict(groups=5, **SAME)  # 135 channels used of 136
    inputs = make_inputs(2, 5, 7, 6, dtype=torch.float32, **geometry)
    inputs.offset_mask[..., 135:] = math.nan
    _, grad = gradients(inputs, torch.randn(output_shape(inputs)), **geometry)
    assert grad[..., 135:].eq(0).all()
    assert grad[..., :135].isfinite().all()


@pytest.mark.parametrize('threads', [2, 3])
@pytest.mark.parametrize('batch, groups', [(3, 5), (1, 2), (1, 1)])
def test_threads_do_not_change_a_bit(instruction_set, threads, batch, groups):
    geometry = dict(groups=groups, **SAME)
    inputs = make_inputs(batch, 29, 31, 16, dtype=torch.float32, **geometry)
    grad_output = torch.randn(output_shape(inputs))
    with cpu_threads(1):
        expected = gradients(inputs, grad_output, **geometry)
    with cpu_threads(threads):
        for _ in range(3):
            assert all(map(torch.equal, gradients(inputs, grad_output, **geometry), expected))


def test_batch_elements_are_single_images(instruction_set):
    geometry = dict(groups=2, **SAME)
    inputs = make_inputs(3, 13, 1, 16, dtype=torch.float32, **geometry)
    grad_output = torch.randn(output_shape(inputs))
    whole = gradients(inputs, grad_output, **geometry)
    for n in range(3):
        single = gradients(type(inputs)(*(t[n:n + 1] for t in inputs)), grad_output[n:n + 1],
                           **geometry)
        assert all(torch.equal(a[n:n + 1], b) for a, b in zip(whole, single))


@pytest.mark.hostile
@pytest.mark.parametrize('layout', ['cut', 'channels-first', 'expanded'])
def test_grad_output_of_any_layout(instruction_set, layout):
    geometry = dict(groups=2, **GEOMETRIES['3x3-strided'])
    inputs = make_inputs(3, 5, 7, 5, dtype=torch.float32, **geometry)
    grad_output = torch.randn(output_shape(inputs))
    if layout == 'cut':
        large = torch.full([2 * size for size in grad_output.shape], math.nan)
        view = large[::2, ::2, 1::2, ::2].copy_(grad_output)
    elif layout == 'channels-first':
        view = grad_output.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    else:
        grad_output = torch.ones_like(grad_output)
        view = torch.ones(()).expand_as(grad_output)
    assert not view.is_contiguous()
    assert all(map(torch.equal, gradients(inputs, view, **geometry),
                   gradients(inputs, grad_output, **geometry)))


@pytest.mark.hostile
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf, 1e9, -1e9, 3e38])
@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16], ids=dtype_name)
def test_samples_nowhere_have_zero_gradients(instruction_set, axis, bad, dtype):
    geometry = dict(groups=3, **GEOMETRIES['3x3-strided'])
    inputs = make_inputs(2, 7, 9, 5, dtype=dtype, **geometry)
    without = inputs.offset_mask.clone()
    inputs.offset_mask[..., 27 + 2 * 4 + axis] = bad
    without[..., 27 + 18 + 4] = 0
    grad_output = torch.randn(output_shape(inputs), dtype=torch.float64)
    grad_value, grad = gradients(inputs, grad_output, **geometry)
    expected_value, expected = gradients(inputs._replace(offset_mask=without), grad_output,
                                         **geometry)
    assert torch.equal(grad_value, expected_value)
    dead = [27 + 8, 27 + 9, 27 + 18 + 4]
    assert grad[..., dead].eq(0).all()
    live = [channel for channel in range(grad.shape[3]) if channel not in dead]
    assert torch.equal(grad[..., live], expected[..., live])


@pytest.mark.hostile
def test_everything_nan_is_zero(instruction_set):
    geometry = dict(groups=2, **SAME)
    inputs = make_inputs(2, 5, 7, 6, dtype=torch.float32, **geometry)
    for tensor in inputs:
        tensor.fill_(math.nan)
    for grad in gradients(inputs, torch.full(output_shape(inputs), math.nan), **geometry):
        assert grad.eq(0).all()


@pytest.mark.hostile
@pytest.mark.parametrize('what', ['value', 'mask', 'grad_output'])
@pytest.mark.parametrize('softmax', [False, True])
def test_nan_spreads_as_in_the_reference(instruction_set, what, softmax):
    geometry = dict(groups=2, softmax=softmax, **SAME)
    inputs = make_inputs(2, 5, 7, 6, dtype=torch.float32, **geometry)
    grad_output = torch.randn(output_shape(inputs))
    if what == 'value':
        inputs.value[0, 2, 3, 4] = math.nan
    elif what == 'mask':
        inputs.offset_mask[0, 2, 3, 18 + 4] = math.nan
    else:
        grad_output[0, 2, 3, 4] = math.nan
    actual = gradients(inputs, grad_output, **geometry)
    reference = forward_backward(dcnv4_reference, inputs, grad_output, **geometry)[1:]
    for grad, expected in zip(actual, reference):
        assert torch.equal(grad.isnan(), expected.isnan())
    nan = torch.cat([grad.flatten() for grad in actual]).isnan()
    assert nan.any() and not nan.all()


@pytest.mark.hostile
@pytest.mark.parametrize('what', ['value', 'mask', 'grad_output'])
@pytest.mark.parametrize('bad', [math.inf, -math.inf])
@pytest.mark.parametrize('whole', [False, True], ids=['between', 'on-pixels'])
def test_infinite_numbers_reach_as_far_as_in_the_reference(instruction_set, what, bad, whole):
    """The same results are not finite. Whether they are infinite or NaN is left open: the kernels
    multiply mask and weights first, and inf * 0 is NaN."""
    geometry = dict(groups=2, **GEOMETRIES['3x3-strided'])
    inputs = make_inputs(2, 9, 7, 6, dtype=torch.float32, **geometry)
    packed = inputs.offset_mask[..., :54].unflatten(-1, (2, 27))
    if whole:
        packed[..., :18] = packed[..., :18].round()
    grad_output = torch.randn(output_shape(inputs))
    tensor = dict(value=inputs.value, mask=packed[..., 18:].flatten(-2),
                  grad_output=grad_output)[what]
    chosen = torch.rand(tensor.shape) < 0.01
    if what == 'mask':
        packed[..., 18:][chosen.unflatten(-1, (2, 9))] = bad
    else:
        tensor[chosen] = bad
    actual = forward_backward(native, inputs, grad_output, **geometry)
    expected = forward_backward(dcnv4_reference, inputs, grad_output, **geometry)
    for one, other in zip(actual, expected):
        assert torch.equal(one.isfinite(), other.isfinite())
    assert any(not tensor.isfinite().all() for tensor in expected)


@pytest.mark.hostile
@pytest.mark.parametrize('x, y', [(0, 0), (4, 3), (0, 3), (2, 1), (-1, 2), (5, 2), (2, 4)])
def test_right_hand_derivatives_on_integers(instruction_set, x, y):
    """At a pixel the gradient is that of the cell to the right of it and below it."""
    value = torch.randint(-8, 9, (1, 4, 5, 3)) / 4  # whose sums are exact
    offset_mask = torch.zeros(1, 1, 1, 8)
    offset_mask[..., :3] = torch.tensor([x, y, 2.])
    value.requires_grad_(), offset_mask.requires_grad_()
    out = native(value, offset_mask, kernel_size=1, groups=1, stride=5)
    _, grad = torch.autograd.grad(out.sum(), (value, offset_mask))
    padded = torch.nn.functional.pad(value.detach()[0].sum(-1), (1, 2, 1, 2))
    inside = 0 <= x < 5 and 0 <= y < 4
    here, right, below = (padded[y + 1 + dy, x + 1 + dx] for dy, dx in ((0, 0), (0, 1), (1, 0)))
    expected = [2 * (right - here), 2 * (below - here), here] if inside else [0, 0, 0]
    assert grad[0, 0, 0, :3].tolist() == list(map(float, expected))


def test_float32_accumulation_of_half_gradients(instruction_set):
    """4096 contributions of 1 to one pixel: a sum in half precision would stop at 256 or 2048."""
    value = torch.ones(1, 64, 64, 1, dtype=torch.bfloat16, requires_grad=True)
    rows, columns = torch.arange(64.)[:, None], torch.arange(64.)
    offset_mask = torch.zeros(1, 64, 64, 8)
    offset_mask[..., 0], offset_mask[..., 1], offset_mask[..., 2] = 5 - columns, 7 - rows, 1
    native(value, offset_mask, kernel_size=1, groups=1).sum().backward()
    assert value.grad[0, 7, 5, 0] == 4096
    assert value.grad.sum() == 4096


def test_gradients_are_written_whole(instruction_set):
    """A repeated call gives the same gradients: nothing is added to what memory held before."""
    geometry = dict(groups=3, **SAME)
    inputs = make_inputs(2, 9, 7, 5, dtype=torch.float32, **geometry)
    grad_output = torch.randn(output_shape(inputs))
    first = gradients(inputs, grad_output, **geometry)
    junk = [torch.full_like(tensor, math.nan) for tensor in inputs for _ in range(4)]
    del junk
    assert all(map(torch.equal, gradients(inputs, grad_output, **geometry), first))


@pytest.mark.parametrize('kernel_size', [1, 2, (1, 2), (2, 5), 4, (6, 1), 7])
def test_any_number_of_taps(instruction_set, kernel_size):
    geometry = dict(groups=2, kernel_size=kernel_size, padding=3)
    assert_matches_reference(native, make_inputs(2, 7, 9, 16, dtype=torch.float32, **geometry),
                             **geometry)


def test_calls_do_not_remember_each_other(instruction_set):
    """The same B, H, W, G, D with other kernels, strides and dtypes, to and fro."""
    for _ in range(2):
        for kernel_size, stride in ((3, 1), (5, 1), (3, 2)):
            for dtype in (torch.float32, torch.float64):
                geometry = dict(groups=2, kernel_size=kernel_size, padding=2, stride=stride)
                assert_matches_reference(native, make_inputs(2, 5, 7, 4, dtype=dtype, **geometry),
                                         **geometry)


def test_every_element_is_written(instruction_set):
    """torch fills new memory with NaN here; none of it may be left in a result."""
    inputs = make_inputs(2, 5, 7, 5, groups=3, dtype=torch.float32, **SAME)
    torch.use_deterministic_algorithms(True)
    previous, torch.utils.deterministic.fill_uninitialized_memory = (
        torch.utils.deterministic.fill_uninitialized_memory, True)
    try:
        assert torch.empty(4).isnan().all()
        results = forward_backward(native, inputs, torch.randn(2, 5, 7, 15), groups=3, **SAME)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = previous
        torch.use_deterministic_algorithms(False)
    assert all(result.isfinite().all() for result in results)
