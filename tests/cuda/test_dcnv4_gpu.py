# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU, in every dtype, against the reference in float64.

Skipped without a GPU. `tools/test_gpu.sh` builds the kernels, runs this file and more, and fails
where a test was skipped for want of kernels.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_cases import BF16, DTYPES, F16, F32, F64, SIZES, hostile_offsets, make_call, size_name
from torch import nn

from mmdcnv4.ops import DCNv4, _extension, dcnv4, dcnv4_reference
from mmdcnv4.ops.contract import make_geometry
from mmdcnv4.testing import (
    GEOMETRIES,
    assert_as_accurate,
    assert_matches_reference,
    forward_backward,
)

GOLDEN = Path(__file__).parents[1] / 'data' / 'dcnv4_op.npz'
DEVICE = 'cuda'
SAME = dict(kernel_size=3, padding=1)
NAMES = ('output', 'grad_value', 'grad_offset_mask')
LARGE = [(2, 56, 56, 4, 16), (3, 14, 14, 16, 32), (2, 7, 7, 80, 16), (1, 33, 65, 8, 48)]


def why_not():
    if not torch.cuda.is_available():
        return 'no GPU'
    return '' if 'cuda' in _extension.build_info else 'the CUDA kernels are not compiled'


@pytest.fixture(params=['direct', 'fast'])
def both_paths(request):
    """Runs a test with the tensor-core kernels forced off, and forced on."""
    torch.ops.mmdcnv4._set_cuda_fast(request.param == 'fast')
    yield request.param
    torch.ops.mmdcnv4._set_cuda_fast(_extension.build_info['cuda']['fast'])


@pytest.fixture
def fast_path():
    """Runs a test with the tensor-core kernels."""
    torch.ops.mmdcnv4._set_cuda_fast(True)
    yield
    torch.ops.mmdcnv4._set_cuda_fast(_extension.build_info['cuda']['fast'])


pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(why_not()), reason=why_not() or 'a GPU')]


def on_gpu(value, offset_mask, **geometry):
    """`dcnv4` of CPU tensors, computed on the GPU."""
    return dcnv4(value.to(DEVICE), offset_mask.to(DEVICE), backend='native', **geometry).cpu()


def gpu_inputs(size=(2, 9, 7, 2, 16), dtypes=(F32, F32), **geometry):
    inputs, grad_output = make_call(size, dtypes, geometry or SAME)
    return inputs.value.to(DEVICE), inputs.offset_mask.to(DEVICE), grad_output.to(DEVICE)


WINDOW_GEOMETRIES = {
    '3x3': dict(kernel_size=3, padding=1),
    '3x3-wide': dict(kernel_size=3, padding=1, offset_scale=2.0),
    '3x3-ring': dict(kernel_size=3, padding=(1, 2), offset_scale=0.5, remove_center=True),
}
HALVES = ('f16', 'bf16', 'f16-f32', 'bf16-f32')
# every D; prime maps; one pixel; ragged tiles and slices; 80 groups
WINDOW_SIZES = [(2, 56, 56, 4, 16), (3, 14, 14, 16, 32), (2, 7, 7, 80, 16), (1, 33, 65, 3, 64),
                (3, 1, 1, 3, 32), (2, 13, 1, 5, 16), (5, 7, 11, 1, 64), (1, 100, 160, 4, 32)]


def took_tensor_cores(run):
    """Whether `run` launched the kernels on tensor cores: forward, backward; by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    return tuple(any(kernel in name for name in names)
                 for kernel in ('dcnv4_window_forward', 'dcnv4_window_grad_value'))


def assert_all(actual, inputs, grad_output, **geometry):
    """Compares output and gradients with the reference."""
    reference = forward_backward(dcnv4_reference, inputs, grad_output, **geometry)
    exact = forward_backward(dcnv4_reference, inputs.leaves(F64, F64), grad_output, **geometry)
    for name, *tensors in zip(NAMES, actual, reference, exact):
        assert torch.isfinite(tensors[0]).all(), name
        assert_as_accurate(*tensors, name=name)


@pytest.mark.parametrize('dtypes', HALVES)
@pytest.mark.parametrize('depth', [16, 32, 64])
@pytest.mark.parametrize('name', WINDOW_GEOMETRIES)
def test_window_geometries(fast_path, name, depth, dtypes):
    """Every kernel on tensor cores; samples near, far, and outside the image."""
    geometry = dict(WINDOW_GEOMETRIES[name], groups=3)
    inputs, grad_output = make_call((2, 9, 13, 3, depth), DTYPES[dtypes], WINDOW_GEOMETRIES[name])
    assert_all(forward_backward(on_gpu, inputs, grad_output, **geometry), inputs, grad_output,
               **geometry)


@pytest.mark.parametrize('dtypes', ['f16', 'bf16-f32'])
@pytest.mark.parametrize('size', WINDOW_SIZES, ids=size_name)
def test_window_sizes(fast_path, size, dtypes):
    inputs, grad_output = make_call(size, DTYPES[dtypes], SAME)
    geometry = dict(SAME, groups=size[3])
    assert_all(forward_backward(on_gpu, inputs, grad_output, **geometry), inputs, grad_output,
               **geometry)


@pytest.mark.parametrize('dtypes', HALVES)
@pytest.mark.parametrize('name', WINDOW_GEOMETRIES)
@pytest.mark.parametrize('where', ['value', 'grad_output'])
def test_window_of_hostile_numbers(fast_path, name, dtypes, where):
    """NaN and infinite offsets and pixels: the same results are finite as without the window."""
    geometry = dict(WINDOW_GEOMETRIES[name], groups=3)
    inputs, grad_output = make_call((2, 15, 17, 3, 32), DTYPES[dtypes], WINDOW_GEOMETRIES[name])
    inputs = hostile_offsets(inputs, make_geometry(**geometry).points)
    assert_all(forward_backward(on_gpu, inputs, grad_output, **geometry), inputs, grad_output,
               **geometry)
    for y, x in ((0, 16), (14, 0), (14, 14), (7, 8)):
        (inputs.value if where == 'value' else grad_output)[:, y, x, ::3] = torch.nan
    expected = forward_backward(dcnv4_reference, inputs, grad_output, **geometry)
    assert any(tensor.isnan().any() for tensor in expected)
    actual = forward_backward(on_gpu, inputs, grad_output, **geometry)
    for name, one, other in zip(NAMES, actual, expected):
        assert not other.isnan().all() and torch.equal(one.isnan(), other.isnan()), name


def test_window_backward_is_repeatable(fast_path):
    """As long as no sample is far from its pixel: then nothing is added in any order."""
    inputs, grad_output = make_call((2, 56, 56, 4, 32), DTYPES['bf16'], SAME)
    inputs.offset_mask[..., :108].unflatten(-1, (4, 27))[..., :18] *= 0.02
    first, *others = (forward_backward(on_gpu, inputs, grad_output, groups=4, **SAME)
                      for _ in range(5))
    assert all(torch.equal(one, two) for other in others for one, two in zip(first, other))


def test_the_switch(both_paths):
    """The switch chooses the kernel; calls that the fast one is not made for take the other."""
    is_fast = both_paths == 'fast' and torch.cuda.get_device_capability() >= (8, 0)
    for dtypes, geometry, is_theirs in (
            ((F16, F16), SAME, True), ((BF16, F32), SAME, True), ((F32, F32), SAME, False),
            ((F16, F16), dict(kernel_size=5, padding=2), False),
            ((F16, F16), dict(kernel_size=3, stride=2, padding=1), False)):
        tensors = gpu_inputs(dtypes=dtypes, **geometry)

        def run(tensors=tensors, geometry=geometry):
            gradients(*tensors, groups=2, backend='native', **geometry)
        run()
        assert took_tensor_cores(run) == 2 * (is_fast and is_theirs,)


def gradients(value, offset_mask, grad_output, **options):
    value, offset_mask = (t.detach().requires_grad_() for t in (value, offset_mask))
    output = dcnv4(value, offset_mask, **options)
    return (output, *torch.autograd.grad(output, (value, offset_mask), grad_output))


@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('name', GEOMETRIES)
def test_geometries(name, dtypes):
    inputs, _ = make_call((2, 9, 13, 3, 16), DTYPES[dtypes], GEOMETRIES[name])
    assert_matches_reference(on_gpu, inputs, groups=3, **GEOMETRIES[name])


@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('size', SIZES + LARGE, ids=size_name)
def test_sizes(size, dtypes):
    inputs, _ = make_call(size, DTYPES[dtypes], SAME)
    assert_matches_reference(on_gpu, inputs, groups=size[3], **SAME)


def test_golden_numbers():
    archive = np.load(GOLDEN)
    for i, case in enumerate(json.loads(str(archive['cases']))):
        def read(name, i=i):
            return torch.from_numpy(archive[f'{name}{i}'])
        geometry = {key: case[key] for key in
                    ('kernel_size', 'stride', 'padding', 'dilation', 'offset_scale',
                     'remove_center', 'softmax')}
        geometry['groups'] = case['group']
        value, offset_mask = (read(name).requires_grad_() for name in ('value', 'offset_mask'))
        output = on_gpu(value, offset_mask, **geometry)
        grads = torch.autograd.grad(output, (value, offset_mask), read('grad_output'))
        for name, actual in zip(NAMES, (output, *grads)):
            torch.testing.assert_close(actual, read(name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('name', ['3x3', '3x3-strided', '3x3-ring', '5x5'])
def test_hostile_offsets(name, dtypes):
    geometry = dict(GEOMETRIES[name], groups=3)
    inputs, grad_output = make_call((2, 15, 17, 3, 8), DTYPES[dtypes], GEOMETRIES[name])
    inputs = hostile_offsets(inputs, make_geometry(**geometry).points)
    actual = forward_backward(on_gpu, inputs, grad_output, **geometry)
    reference = forward_backward(dcnv4_reference, inputs, grad_output, **geometry)
    exact = forward_backward(dcnv4_reference, inputs.leaves(F64, F64), grad_output, **geometry)
    for name, *tensors in zip(NAMES, actual, reference, exact):
        assert torch.isfinite(tensors[0]).all(), name
        assert_as_accurate(*tensors, name=name)


def test_nan_pixels_spread_no_further():
    inputs, _ = make_call((2, 9, 7, 2, 12), DTYPES['f32'], SAME)
    inputs = hostile_offsets(inputs, 9)
    for y, x in ((0, 0), (0, 6), (8, 0), (8, 6), (4, 3)):
        inputs.value[:, y, x] = torch.nan
    expected = dcnv4_reference(*inputs, groups=2, **SAME).isnan()
    assert expected.any() and not expected.all()
    assert torch.equal(on_gpu(*inputs, groups=2, **SAME).isnan(), expected)


def test_gradcheck():
    value, offset_mask, _ = gpu_inputs((2, 3, 4, 2, 3), (F64, F64))
    options = dict(groups=2, backend='native', **SAME)
    assert torch.autograd.gradcheck(lambda v, o: dcnv4(v, o, **options),
                                    (value.requires_grad_(), offset_mask.requires_grad_()),
                                    nondet_tol=1e-10)


@pytest.mark.parametrize('dtypes', DTYPES)
def test_opcheck(dtypes):
    value, offset_mask, grad_output = gpu_inputs(dtypes=DTYPES[dtypes])
    scalars = ([3, 3], 2, [1, 1], [1, 1], [1, 1], 1.0, False, False)
    torch.library.opcheck(torch.ops.mmdcnv4.dcnv4.default, (value, offset_mask, *scalars))
    torch.library.opcheck(torch.ops.mmdcnv4._dcnv4_backward.default,
                          (grad_output, value, offset_mask, *scalars))


def test_strided_and_misaligned_inputs():
    value, offset_mask, grad_output = gpu_inputs()
    expected = gradients(value, offset_mask, grad_output, groups=2, **SAME)
    for shift in (1, 2, 3):  # a view that starts in the middle of a vector
        moved = []
        for tensor in (value, offset_mask, grad_output):
            flat = torch.empty(tensor.numel() + shift, device=DEVICE)[shift:]
            moved.append(flat.copy_(tensor.flatten()).view(tensor.shape))
        for actual, other in zip(gradients(*moved, groups=2, **SAME), expected):
            torch.testing.assert_close(actual, other, rtol=1e-5, atol=1e-5)
    wide = torch.randn(*value.shape[:3], value.shape[3] + 3, device=DEVICE)
    wide[..., 2:-1] = value
    swapped = offset_mask.transpose(1, 2).contiguous().transpose(1, 2)
    actual = gradients(wide[..., 2:-1], swapped, grad_output, groups=2, **SAME)
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_empty_batch(both_paths):
    value, offset_mask, _ = gpu_inputs(dtypes=(F16, F16))
    output, grad_value, grad_packed = gradients(
        value[:0], offset_mask[:0], value.new_zeros(0, 9, 7, 32), groups=2, **SAME)
    assert output.shape == (0, 9, 7, 32)
    assert grad_value.shape == value[:0].shape and grad_packed.shape == offset_mask[:0].shape


@pytest.mark.parametrize('dtype', [F16, BF16])
def test_autocast(dtype, both_paths):
    value, offset_mask, grad_output = gpu_inputs()
    with torch.autocast(DEVICE, dtype=dtype):
        output, grad_value, grad_packed = gradients(value, offset_mask, grad_output.to(dtype),
                                                    groups=2, **SAME)
    assert (output.dtype, grad_value.dtype, grad_packed.dtype) == (dtype, F32, F32)
    exact = dcnv4_reference(value.to(dtype).double(), offset_mask.double(), groups=2, **SAME)
    reference = dcnv4_reference(value.to(dtype), offset_mask, groups=2, **SAME)
    assert_as_accurate(output.detach(), reference, exact)


def test_compile():
    value, offset_mask, grad_output = gpu_inputs(dtypes=(F16, F32))
    compiled = torch.compile(lambda v, o: 2 * dcnv4(v + 1, o, groups=2, **SAME), fullgraph=True)
    value.requires_grad_(), offset_mask.requires_grad_()
    output = compiled(value, offset_mask)
    grads = torch.autograd.grad(output, (value, offset_mask), grad_output)
    other = 2 * dcnv4(value + 1, offset_mask, groups=2, **SAME)
    expected = torch.autograd.grad(other, (value, offset_mask), grad_output)
    for one, two in zip((output, *grads), (other, *expected)):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=1e-2)


def test_cuda_graph(both_paths):
    """Forward and backward are captured; a replay computes with the numbers of the moment."""
    value, offset_mask, grad_output = gpu_inputs((2, 29, 31, 2, 32), (F16, F16))
    run = torch.ops.mmdcnv4
    scalars = ([3, 3], 2, [1, 1], [1, 1], [1, 1], 1.0, False, False)
    run.dcnv4(value, offset_mask, *scalars)
    run._dcnv4_backward(grad_output, value, offset_mask, *scalars)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run.dcnv4(value, offset_mask, *scalars)
        grads = run._dcnv4_backward(grad_output, value, offset_mask, *scalars)
    for seed in range(2):
        torch.manual_seed(seed)
        value.normal_()
        grad_output.normal_()
        graph.replay()
        torch.cuda.synchronize()
        expected = run._dcnv4_backward(grad_output, value, offset_mask, *scalars)
        assert torch.equal(output, run.dcnv4(value, offset_mask, *scalars))
        assert torch.equal(grads[1], expected[1])
        torch.testing.assert_close(grads[0], expected[0], rtol=2e-3, atol=2e-3)


def test_second_stream(both_paths):
    """The kernels wait for the work before them on the current stream."""
    value, offset_mask, grad_output = gpu_inputs(
        dtypes=(F32, F32) if both_paths == 'direct' else (F16, F16))
    expected = gradients(value, offset_mask, grad_output, groups=2, **SAME)
    late = torch.zeros_like(value)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)  # about a tenth of a second
        late.copy_(value)
        actual = gradients(late, offset_mask, grad_output, groups=2, **SAME)
    stream.synchronize()
    tolerance = 1e-5 if value.dtype == F32 else 2e-3
    for one, other in zip(actual, expected):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_no_synchronisation(both_paths):
    value, offset_mask, grad_output = gpu_inputs(dtypes=(F16, F32))
    gradients(value, offset_mask, grad_output, groups=2, **SAME)
    torch.cuda.set_sync_debug_mode('error')
    try:
        gradients(value, offset_mask, grad_output, groups=2, **SAME)
    finally:
        torch.cuda.set_sync_debug_mode('default')


@pytest.mark.parametrize('dtypes', DTYPES)
def test_deterministic_mode(both_paths, dtypes):
    """Output and gradients are bitwise repeatable, and right."""
    geometry = dict(SAME, groups=4)
    inputs, grad_output = make_call((2, 56, 56, 4, 16), DTYPES[dtypes], SAME)
    try:
        torch.use_deterministic_algorithms(True)
        first, *others = (forward_backward(on_gpu, inputs, grad_output, **geometry)
                          for _ in range(5))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(one, two) for other in others for one, two in zip(first, other))
    assert_all(first, inputs, grad_output, **geometry)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='one GPU')
def test_other_device():
    """Tensors on a device that is not the current one."""
    inputs, grad_output = make_call((2, 5, 7, 2, 16), DTYPES['f32'], SAME)
    results = [gradients(*(t.to(f'cuda:{i}') for t in (*inputs, grad_output)), groups=2, **SAME)
               for i in (0, 1)]
    for one, other in zip(*results):
        assert other.device.index == 1
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=1e-5, atol=1e-5)


def test_devices_are_not_mixed():
    value, offset_mask, _ = gpu_inputs()
    with pytest.raises((RuntimeError, ValueError), match='device'):
        dcnv4(value, offset_mask.cpu(), groups=2, backend='native', **SAME)


@pytest.mark.skipif(not torch.cuda.is_available()
                    or torch.cuda.get_device_properties(0).total_memory < 40e9,
                    reason='needs 40 GB of GPU memory')
def test_more_than_two_to_the_31_elements():
    """Whole offsets into the last lines of a large image; 64-bit element offsets."""
    side, channels, stride = 4096, 136, 93
    value = torch.zeros(1, side, side, channels, dtype=F16, device=DEVICE)
    assert value.numel() > 2**31
    value[:, -1] = torch.arange(side, device=DEVICE, dtype=F32).div(8).to(F16)[:, None]
    count = -(-side // stride)
    offset_mask = torch.zeros(1, count, count, 8, dtype=F32, device=DEVICE)
    lines = torch.arange(count, device=DEVICE) * stride
    offset_mask[..., 1] = (side - 1 - lines)[None, :, None]  # every tap samples the last line
    offset_mask[..., 2] = 1.0
    options = dict(kernel_size=1, groups=1, stride=stride, backend='native')
    output, grad_value, _ = gradients(value, offset_mask, torch.ones(
        1, count, count, channels, dtype=F16, device=DEVICE), **options)
    expected = value[0, -1, ::stride].expand(count, -1, -1)
    assert torch.equal(output[0], expected)
    assert torch.equal(grad_value[0, -1, ::stride], torch.full_like(expected[0], count))
    assert grad_value[:, :-1].count_nonzero() == 0


def test_training(both_paths):
    """A small network of two DCNv4 layers learns to tell horizontal from vertical bars."""
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(1, 32)
            self.layers = nn.ModuleList(DCNv4(32, group=2) for _ in range(2))
            self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(2))
            self.head = nn.Linear(32, 2)

        def forward(self, x):
            x = self.stem(x)
            for layer, norm in zip(self.layers, self.norms):
                x = x + layer(norm(x))
            return self.head(x.amax(dim=(1, 2)))

    def batch(count=32, side=16):
        images, labels = torch.randn(count, side, side, 1) * 0.3, torch.randint(2, (count,))
        for i, label in enumerate(labels):
            y, x = torch.randint(side - 8, (2,)).tolist()
            (images[i, y, x:x + 8] if label else images[i, y:y + 8, x]).add_(2)
        return images.to(DEVICE), labels.to(DEVICE)

    half = torch.autocast(DEVICE, dtype=BF16, enabled=both_paths == 'fast')
    net = Net().to(DEVICE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        images, labels = batch()
        with half:
            loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10]), losses[::10]
