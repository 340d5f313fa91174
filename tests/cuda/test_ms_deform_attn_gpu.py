# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention on a GPU, against a dense form in float64 and the CPU kernels.

Skipped without a GPU; a part of `make test-gpu`.
"""

from __future__ import annotations

import math

import pytest
import torch

from helpers.attention_cases import (
    BF16,
    DTYPES,
    F16,
    F32,
    F64,
    NAMES,
    SIZES,
    Inputs,
    assert_accurate,
    make_inputs,
)
from helpers.gpu_cases import DEVICE, needs_memory, on_a_gpu
from mmdcnv4.ops import FlashDeformAttn, multi_scale_deformable_attention

pytestmark = on_a_gpu
LARGE = (2, 700, 8, 32, 4, [(40, 50), (20, 25), (10, 13), (5, 7)])


def run(inputs, device=DEVICE, backend='native'):
    """Output and gradients, on the CPU."""
    leaves = [tensor.to(device).requires_grad_() for tensor in inputs[:3]]
    output = multi_scale_deformable_attention(leaves[0], inputs.sizes, *leaves[1:],
                                              backend=backend)
    grads = torch.autograd.grad(output, leaves, inputs.grad_output.to(device))
    return [tensor.detach().cpu() for tensor in (output, *grads)]


@pytest.fixture
def deterministic():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('name', SIZES)
def test_sizes(name, dtypes):
    inputs = make_inputs(name, DTYPES[dtypes])
    assert_accurate(run(inputs), inputs)


@pytest.mark.parametrize('dtypes', DTYPES)
def test_many_blocks(dtypes):
    """Against the CPU kernels in float64, which the dense form would take minutes for."""
    inputs = make_inputs(LARGE, DTYPES[dtypes])
    wide = Inputs(*(tensor.double() for tensor in inputs[:3]), inputs.sizes,
                  inputs.grad_output.double())
    assert_accurate(run(inputs), inputs, run(wide, 'cpu'))


@pytest.mark.parametrize('dtypes', ['f64', 'f32', 'f16', 'bf16-f32'])
@pytest.mark.parametrize('name', [LARGE, 'odd', 'crowded', 'very-wide'], ids=str)
def test_deterministic(name, dtypes, deterministic):
    inputs = make_inputs(name, DTYPES[dtypes])
    first, others = run(inputs), [run(inputs) for _ in range(3)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other))
    wide = Inputs(*(tensor.double() for tensor in inputs[:3]), inputs.sizes,
                  inputs.grad_output.double())
    assert_accurate(first, inputs, run(wide, 'cpu'))


@pytest.mark.parametrize('dtypes', ['f32', 'f16', 'bf16-f32'])
def test_all_samples_in_one_place(dtypes):
    """Every team adds to the same four pixels."""
    inputs = make_inputs(LARGE, DTYPES[dtypes])
    inputs.locations[:] = inputs.locations[0, 0, 0]
    wide = Inputs(*(tensor.double() for tensor in inputs[:3]), inputs.sizes,
                  inputs.grad_output.double())
    # sums of thousands of numbers of either sign: their errors do not cancel as the sums do
    assert_accurate(run(inputs), inputs, run(wide, 'cpu'), factor=4)


@pytest.mark.hostile
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf, 1e9, -1e9])
@pytest.mark.parametrize('axis', [0, 1])
def test_far_and_undefined_locations_count_as_zero(bad, axis):
    inputs = make_inputs('odd', DTYPES['f32'])
    hostile, quiet = inputs.locations.clone(), inputs.weights.clone()
    hostile[:, ::2, :, 1, 2, axis] = bad
    quiet[:, ::2, :, 1, 2] = 0
    found = run(inputs._replace(locations=hostile))
    expected = run(inputs._replace(weights=quiet))
    for index in (0, 1):
        torch.testing.assert_close(found[index], expected[index])
    assert not found[2][:, ::2, :, 1, 2].any() and not found[3][:, ::2, :, 1, 2].any()


@pytest.mark.hostile
@pytest.mark.parametrize('dtypes', ['f32', 'f16', 'bf16'])
def test_nan_stays_where_it_is_sampled(dtypes):
    inputs = make_inputs('encoder', DTYPES[dtypes])
    inputs.value[0, 5] = math.nan
    inputs.grad_output[1, 3, :7] = math.nan
    inputs.weights[1, 9, 1, 0, 1] = math.nan
    found, expected = run(inputs), run(Inputs(*(t.float() for t in inputs[:3]), inputs.sizes,
                                              inputs.grad_output.float()), 'cpu')
    for name, one, right in zip(NAMES, found, expected):
        assert torch.equal(one.isnan(), right.isnan()), name


@pytest.mark.hostile
@pytest.mark.parametrize('batch, queries', [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_do(batch, queries):
    found = run(make_inputs((batch, queries, 2, 4, 3, [(2, 3), (1, 1)])))
    assert found[0].shape == (batch, queries, 8) and not found[1].any()


def test_alignment_and_strides():
    """Tensors that begin in the middle of a vector, or lie otherwise in memory."""
    inputs = make_inputs('encoder', DTYPES['f16'])
    expected = run(inputs)
    room = torch.empty(inputs.value.numel() + 1, dtype=F16, device=DEVICE)
    moved = room[1:].view(inputs.value.shape).copy_(inputs.value)
    mixed = inputs.value.to(DEVICE).permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    for value in (moved, mixed):
        found = run(inputs._replace(value=value.detach()))
        for one, right in zip(found, expected):
            torch.testing.assert_close(one, right, atol=2e-3, rtol=2e-3)


@needs_memory(40)
@pytest.mark.hostile
def test_large():
    """value has more than 2^31 numbers; samples lie in its last lines."""
    side, heads, channels = 8192, 1, 40
    value = torch.zeros(1, side * side, heads, channels, dtype=F16, device=DEVICE)
    crop = torch.randn(1, 64, side, heads, channels, dtype=F16, device=DEVICE)
    value.view(1, side, side, heads, channels)[:, -64:] = crop
    # whole eighths of a pixel are exact
    place = torch.randint(0, 63 * 8, (1, 50, heads, 1, 4, 2), device=DEVICE) / 8
    place[..., 1] += side - 64
    locations = (place + 0.5) / side
    weights = torch.randn(1, 50, heads, 1, 4, device=DEVICE)
    value.requires_grad_()
    output = multi_scale_deformable_attention(value, [(side, side)], locations, weights)
    grad, = torch.autograd.grad(output, value, torch.ones_like(output))
    small = crop[:, :, :64].flatten(1, 2).double().cpu().requires_grad_()
    place[..., 1] -= side - 64
    expected = multi_scale_deformable_attention(small, [(64, 64)], ((place + 0.5) / 64).cpu(),
                                                weights.cpu())
    torch.testing.assert_close(output.double().cpu(), expected, atol=5e-3, rtol=5e-3)
    wanted, = torch.autograd.grad(expected, small, torch.ones_like(expected))
    found = grad.view(side, side, channels)[-64:, :64]
    torch.testing.assert_close(found.double().cpu().flatten(0, 1), wanted[0, :, 0], atol=5e-3,
                               rtol=5e-3)
    assert not grad.view(side, side, channels)[:-64].any()


def test_stream_and_graph():
    """A captured call, replayed with other numbers, gives what a plain call gives."""
    inputs = make_inputs('encoder', DTYPES['f32'])
    tensors = [tensor.to(DEVICE).requires_grad_() for tensor in inputs[:3]]
    grad = inputs.grad_output.to(DEVICE)

    def call():
        output = multi_scale_deformable_attention(tensors[0], inputs.sizes, *tensors[1:])
        return (output, *torch.autograd.grad(output, tensors, grad))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    other = make_inputs('encoder', DTYPES['f32'], seed=5)
    with torch.no_grad():
        for tensor, new in zip(tensors, other[:3]):
            tensor.copy_(new)
    graph.replay()
    torch.cuda.synchronize()
    for one, right in zip(captured, run(other._replace(grad_output=inputs.grad_output))):
        torch.testing.assert_close(one.detach().cpu(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('dtypes', ['f32', 'f16-f32'])
def test_opcheck(dtypes):
    inputs = make_inputs('odd', DTYPES[dtypes])
    tensors = [tensor.to(DEVICE).requires_grad_() for tensor in inputs[:3]]
    flat = [side for size in inputs.sizes for side in size]
    torch.library.opcheck(torch.ops.mmdcnv4.ms_deform_attn.default, (*tensors, flat))


@pytest.mark.parametrize('dtype', [F32, F16, BF16])
def test_module(dtype):
    module = FlashDeformAttn(32, 2, 4, 3)
    sizes = [(6, 5), (3, 2)]
    call = (torch.randn(2, 9, 32), torch.rand(2, 9, 2, 2), torch.randn(2, 36, 32),
            torch.tensor(sizes))
    expected = module(*call)
    found = module.to(DEVICE, dtype)(*(t.to(DEVICE, dtype) if t.is_floating_point() and i != 1
                                       else t.to(DEVICE) for i, t in enumerate(call)))
    assert found.dtype == dtype
    allowed = {F32: 1e-5, F16: 3e-3, BF16: 3e-2}[dtype]  # of the linear layers
    assert (found.float().cpu() - expected).norm() < allowed * expected.norm()


def test_what_a_gpu_cannot_count():
    inputs = make_inputs((1, 1, 1, 4, 1, [(1, 1)] * 257))
    with pytest.raises((RuntimeError, ValueError), match='at most 256 levels on a GPU, got 257'):
        run(inputs)
    with pytest.raises(TypeError, match='dtype of value'):
        torch.ops.mmdcnv4.ms_deform_attn(*(t.to(DEVICE, dtype) for t, dtype in zip(
            make_inputs('odd')[:3], (F16, F64, F16))), [8, 9, 4, 5, 3, 1])
