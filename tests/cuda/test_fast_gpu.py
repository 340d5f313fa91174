# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The kernels on tensor cores, on a GPU, against the reference in float64; skipped without one."""

from __future__ import annotations

import pytest
import torch

from helpers.cuda_cases import BF16, DTYPES, F16, F32, F64, hostile_offsets, make_call, size_name
from helpers.gpu_cases import (
    DEVICE,
    NAMES,
    SAME,
    check,
    gpu_inputs,
    gradients,
    needs_memory,
    on_a_gpu,
    on_gpu,
    set_fast,
)
from helpers.window_cases import GEOMETRIES, TYPES
from mmdcnv4.ops import dcnv4_reference
from mmdcnv4.ops.contract import make_geometry
from mmdcnv4.testing import forward_backward

# every D; prime maps; one pixel; ragged tiles and slices; 80 groups
SIZES = [(2, 56, 56, 4, 16), (3, 14, 14, 16, 32), (2, 7, 7, 80, 16), (1, 33, 65, 3, 64),
         (3, 1, 1, 3, 32), (2, 13, 1, 5, 16), (5, 7, 11, 1, 64), (1, 50, 80, 4, 32)]

pytestmark = on_a_gpu


@pytest.mark.ragged
@pytest.mark.parametrize('dtypes', TYPES)
@pytest.mark.parametrize('depth', [16, 32, 64])
@pytest.mark.parametrize('name', GEOMETRIES)
def test_geometries(fast_path, name, depth, dtypes):
    """Every kernel on tensor cores; samples near, far, and outside the image. In float32 groups of
    64 channels are left to the direct kernels."""
    inputs, grad_output = make_call((2, 9, 13, 3, depth), DTYPES[dtypes], GEOMETRIES[name])
    check(inputs, grad_output, groups=3, **GEOMETRIES[name])


@pytest.mark.parametrize('dtypes', ['f16', 'bf16-f32', 'f32'])
@pytest.mark.parametrize('size', SIZES, ids=size_name)
def test_sizes(fast_path, size, dtypes):
    inputs, grad_output = make_call(size, DTYPES[dtypes], SAME)
    check(inputs, grad_output, groups=size[3], **SAME)


@pytest.mark.parametrize('dtypes', TYPES)
@pytest.mark.parametrize('name', GEOMETRIES)
@pytest.mark.parametrize('where', ['value', 'grad_output'])
def test_hostile_numbers(fast_path, name, dtypes, where):
    """NaN and infinite offsets and pixels: the same results are finite as without the window."""
    geometry = dict(GEOMETRIES[name], groups=3)
    inputs, grad_output = make_call((2, 15, 17, 3, 32), DTYPES[dtypes], GEOMETRIES[name])
    inputs = hostile_offsets(inputs, make_geometry(**geometry).points)
    check(inputs, grad_output, **geometry)
    for y, x in ((0, -1), (-1, 0), (-1, -1), (7, 8)):
        (inputs.value if where == 'value' else grad_output)[:, y, x, ::3] = torch.nan
    expected = forward_backward(dcnv4_reference, inputs, grad_output, **geometry)
    assert any(tensor.isnan().any() for tensor in expected)
    actual = forward_backward(on_gpu, inputs, grad_output, **geometry)
    for name, one, other in zip(NAMES, actual, expected):
        assert not other.isnan().all() and torch.equal(one.isnan(), other.isnan()), name


@pytest.mark.parametrize('dtypes', ['bf16', 'f32'])
def test_backward_is_repeatable(fast_path, dtypes):
    """As long as no sample is far from its pixel: then nothing is added in any order."""
    inputs, grad_output = make_call((2, 56, 56, 4, 32), DTYPES[dtypes], SAME)
    inputs.offset_mask[..., :108].unflatten(-1, (4, 27))[..., :18] *= 0.02
    first, *others = (forward_backward(on_gpu, inputs, grad_output, groups=4, **SAME)
                      for _ in range(5))
    assert all(torch.equal(one, two) for other in others for one, two in zip(first, other))


def took_tensor_cores(run):
    """Whether `run` launched the kernels on tensor cores: forward, backward; by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    assert any('dcnv4' in name for name in names), names
    return tuple(any(kernel in name for name in names)
                 for kernel in ('dcnv4_window_forward', 'dcnv4_window_grad_value'))


def test_the_switch(both_paths):
    """The switch chooses the kernel; calls that the fast one is not made for take the other."""
    is_fast = both_paths == 'fast' and torch.cuda.get_device_capability() >= (8, 0)
    wide = dict(SAME, offset_scale=2.0)
    for dtypes, depth, geometry, are_theirs in (  # forward, backward
            ((F16, F16), 16, SAME, (True, True)), ((BF16, F32), 64, SAME, (True, True)),
            ((F32, F32), 16, SAME, (True, True)), ((F32, F32), 32, SAME, (True, True)),
            ((F32, F32), 64, SAME, (False, False)), ((F64, F64), 16, SAME, (False, False)),
            ((F16, F16), 16, wide, (False, False)), ((F32, F32), 16, wide, (False, False)),
            ((F16, F16), 16, dict(kernel_size=5, padding=2), (False, False)),
            ((F16, F16), 16, dict(kernel_size=3, stride=2, padding=1), (False, False))):
        tensors = gpu_inputs((2, 9, 7, 2, depth), dtypes, **geometry)

        def run(tensors=tensors, geometry=geometry):
            gradients(*tensors, groups=2, backend='native', **geometry)
        run()
        assert took_tensor_cores(run) == tuple(is_fast and theirs for theirs in are_theirs)


def test_the_switch_in_deterministic_mode(both_paths):
    """Forward it chooses as ever: nothing is added in any order there. Backward the direct kernels
    add in fixed point."""
    is_fast = both_paths == 'fast' and torch.cuda.get_device_capability() >= (8, 0)
    for dtypes in ((F16, F16), (F32, F32)):
        tensors = gpu_inputs(dtypes=dtypes)

        def run(tensors=tensors):
            gradients(*tensors, groups=2, backend='native', **SAME)
        torch.use_deterministic_algorithms(True)
        try:
            run()
            assert took_tensor_cores(run) == (is_fast, False)
        finally:
            torch.use_deterministic_algorithms(False)


@needs_memory(60)
def test_more_than_two_to_the_31_elements(fast_path):
    """The last lines of a large image have the numbers of a small one, by the direct kernels."""
    side, lines, margin, groups = 4096, 40, 16, 9  # no sample is further away than the margin
    options = dict(groups=groups, backend='native', **SAME)
    generator = torch.Generator(DEVICE).manual_seed(0)
    small = [torch.randn(1, lines, side, channels, generator=generator, device=DEVICE).to(F16)
             for channels in (16 * groups, 248, 16 * groups)]
    # multiples of 1/16 between the pixels: exact at any position, and no derivative jumps there
    offsets = small[1][..., :27 * groups].unflatten(-1, (groups, 27))[..., :18]
    offsets.copy_(offsets.mul(8).round().div(8).add(1 / 16))
    large = [torch.zeros(1, side, side, tensor.shape[3], dtype=F16, device=DEVICE)
             for tensor in small]
    for whole, tensor in zip(large, small):
        whole[:, -lines:] = tensor
    assert large[0].numel() > 2**31
    set_fast(False)
    expected = gradients(*small, **options)
    set_fast(True)
    actual = gradients(*large, **options)
    for name, one, other in zip(NAMES, expected, actual):
        one, other = one[:, margin:].float(), other[:, margin - lines:].float()
        assert (one - other).norm() <= 2e-3 * one.norm(), name
        assert one.norm() > 1
