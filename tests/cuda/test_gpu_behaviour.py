# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The kernels within PyTorch, on a GPU: streams, graphs, autocast, compile, determinism, training.

Skipped without a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers.cuda_cases import BF16, DTYPES, F16, F32, F64, make_call
from helpers.gpu_cases import (
    DEVICE,
    NAMES,
    SAME,
    gpu_inputs,
    gradients,
    losses,
    on_a_gpu,
    on_gpu,
)
from mmdcnv4.ops import DCNv4, dcnv4, dcnv4_reference
from mmdcnv4.testing import (
    Inputs,
    assert_accurate,
    assert_within,
    error_bounds,
    forward_backward,
)

SCALARS = ([3, 3], 2, [1, 1], [1, 1], [1, 1], 1.0, False, False)

pytestmark = on_a_gpu


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('both_paths, dtypes', [
    *(('direct', dtypes) for dtypes in DTYPES), ('fast', 'f16'), ('fast', 'bf16-f32'),
    ('fast', 'f32')],
    indirect=['both_paths'])
def test_opcheck(both_paths, dtypes):
    value, offset_mask, grad_output = gpu_inputs(dtypes=DTYPES[dtypes])
    torch.library.opcheck(torch.ops.mmdcnv4.dcnv4.default, (value, offset_mask, *SCALARS))
    torch.library.opcheck(torch.ops.mmdcnv4._dcnv4_backward.default,
                          (grad_output, value, offset_mask, *SCALARS))


@pytest.mark.parametrize('dtypes', ['f32', 'f16'])
def test_strided_and_misaligned_inputs(both_paths, dtypes):
    """Where tensor cores do not take what is misaligned, the direct kernels do: results differ by
    what both round."""
    tensors = value, offset_mask, grad_output = gpu_inputs(dtypes=DTYPES[dtypes])
    dtype, tolerance = value.dtype, 1e-5 if value.dtype == F32 else 2e-3
    expected = gradients(*tensors, groups=2, **SAME)

    def compare(*moved):
        for name, one, other in zip(NAMES, gradients(*moved, groups=2, **SAME), expected):
            assert (one - other).norm() <= tolerance * other.norm(), name

    for shift in (1, 2, 3, 4):  # a view that starts in the middle of a vector
        moved = []
        for tensor in tensors:
            flat = torch.empty(tensor.numel() + shift, dtype=dtype, device=DEVICE)[shift:]
            moved.append(flat.copy_(tensor.flatten()).view(tensor.shape))
        compare(*moved)
        compare(value, moved[1], grad_output)
    wide = torch.randn(*value.shape[:3], value.shape[3] + 3, device=DEVICE).to(dtype)
    wide[..., 2:-1] = value
    nchw = grad_output.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    compare(wide[..., 2:-1], offset_mask.transpose(1, 2).contiguous().transpose(1, 2), nchw)


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
    inputs = Inputs(value.to(dtype), offset_mask)
    assert_accurate([output.detach()], inputs, grad_output, weight_error=2.0**-11, groups=2,
                    **SAME)


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


@pytest.mark.parametrize('is_deterministic', [False, True])
def test_cuda_graph(both_paths, is_deterministic):
    """Forward and backward are captured; a replay computes with the numbers of the moment."""
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        capture_and_replay()
    finally:
        torch.use_deterministic_algorithms(False)


def capture_and_replay():
    value, offset_mask, grad_output = gpu_inputs((2, 29, 31, 2, 32), (F16, F16))
    run = torch.ops.mmdcnv4
    run.dcnv4(value, offset_mask, *SCALARS)
    run._dcnv4_backward(grad_output, value, offset_mask, *SCALARS)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run.dcnv4(value, offset_mask, *SCALARS)
        grads = run._dcnv4_backward(grad_output, value, offset_mask, *SCALARS)
    for seed in range(2):
        torch.manual_seed(seed)
        value.normal_()
        grad_output.normal_()
        graph.replay()
        torch.cuda.synchronize()
        expected = run._dcnv4_backward(grad_output, value, offset_mask, *SCALARS)
        assert torch.equal(output, run.dcnv4(value, offset_mask, *SCALARS))
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


@pytest.mark.parametrize('is_deterministic', [False, True])
def test_no_synchronisation(both_paths, is_deterministic):
    value, offset_mask, grad_output = gpu_inputs(dtypes=(F16, F32))
    gradients(value, offset_mask, grad_output, groups=2, **SAME)
    torch.use_deterministic_algorithms(is_deterministic)
    torch.cuda.set_sync_debug_mode('error')
    try:
        gradients(value, offset_mask, grad_output, groups=2, **SAME)
    finally:
        torch.cuda.set_sync_debug_mode('default')
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize('dtypes', DTYPES)
def test_deterministic_mode(both_paths, deterministic, dtypes):
    """Output and gradients are bitwise repeatable, and right."""
    inputs, grad_output = make_call((2, 31, 29, 4, 16), DTYPES[dtypes], SAME)
    first, *others = (forward_backward(on_gpu, inputs, grad_output, groups=4, **SAME)
                      for _ in range(5))
    assert all(torch.equal(one, two) for other in others for one, two in zip(first, other))
    torch.use_deterministic_algorithms(False)  # no business of the reference
    exact = forward_backward(dcnv4_reference, inputs.leaves(F64, F64), grad_output, groups=4,
                             **SAME)
    bounds = list(error_bounds(inputs, grad_output, groups=4,
                               **losses(inputs.value.dtype, both_paths == 'fast'), **SAME))
    # the step of the fixed point is below 2^-40 of the largest term: float64 alone shows it
    mask = inputs.offset_mask[..., :108].unflatten(-1, (4, 27))[..., 18:]
    bounds[1] = bounds[1] + 2.0**-40 * (grad_output.abs().max() * mask.abs().max()).double()
    for name, actual, right, bound in zip(NAMES, first, exact, bounds):
        assert_within(actual, right, bound, name)


@pytest.mark.ragged
@pytest.mark.parametrize('dtypes', DTYPES)
def test_deterministic_kernels(deterministic, dtypes):
    """A small call of each, for the sanitizer."""
    value, offset_mask, grad_output = gpu_inputs((3, 5, 7, 3, 16), DTYPES[dtypes])
    first, second = (gradients(value, offset_mask, grad_output, groups=3, **SAME)
                     for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))


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


class Block(nn.Module):
    """DCNv4 and an MLP, each beside a shortcut."""

    def __init__(self, width):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.mix = DCNv4(width, group=width // 16)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(),
                                 nn.Linear(4 * width, width))

    def forward(self, x):
        x = x + self.mix(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


class QuickStartNet(nn.Module):
    """The backbone of the quick start without OpenMMLab: its widths, groups and depths.

    Only DCNv4 joins pixels here: the other layers see one at a time.
    """

    def __init__(self, classes):
        super().__init__()
        widths = (1, 32, 64, 128, 256)
        self.downs = nn.ModuleList(map(nn.Linear, widths, widths[1:]))
        self.stages = nn.ModuleList(nn.Sequential(*(Block(width) for _ in range(depth)))
                                    for width, depth in zip(widths[1:], (2, 2, 4, 2)))
        self.norm = nn.LayerNorm(256)
        self.head = nn.Linear(256, classes)

    def forward(self, x):
        for down, stage in zip(self.downs, self.stages):
            x = stage(down(x[:, ::2, ::2]))
        return self.head(self.norm(x.mean(dim=(1, 2))))


def stripes(count, side=64, period=8):
    """Noisy images (N, H, W, 1) of horizontal (label 1) or vertical (label 0) stripes."""
    labels = torch.randint(2, (count,))
    place = torch.arange(side) + torch.randint(period, (count, 1))
    wave = (2 * place // period % 2).float()
    images = torch.where(labels[:, None, None] == 1, wave[:, :, None], wave[:, None, :])
    images = images + 0.3 * torch.randn(count, side, side)
    return images[..., None].to(DEVICE), labels.to(DEVICE)


def test_training(both_paths):
    torch.manual_seed(0)
    net = QuickStartNet(classes=2).to(DEVICE)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-4)
    losses = []
    for _ in range(60):
        images, labels = stripes(32)
        with torch.autocast(DEVICE, dtype=BF16, enabled=both_paths == 'fast'):
            loss = nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < 0.3 * sum(losses[:10]), losses[::6]
    moved = [block.mix.offset_mask.weight.abs().sum() for stage in net.stages for block in stage]
    assert all(weight > 0 for weight in moved)
