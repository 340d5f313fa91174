# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the tests on a GPU share: whether they run, calls on the GPU, comparisons."""

from __future__ import annotations

import pytest
import torch

from helpers.cuda_cases import F32, make_call
from helpers.window_cases import BACKWARD_WEIGHTS, DOTS
from mmdcnv4.ops import _extension, dcnv4, proven
from mmdcnv4.testing import assert_accurate, forward_backward, random_grad_output

DEVICE = 'cuda'
SAME = dict(kernel_size=3, padding=1)
NAMES = ('output', 'grad_value', 'grad_offset_mask')


def why_not() -> str:
    if not torch.cuda.is_available():
        return 'no GPU'
    return '' if 'cuda' in _extension.build_info else 'the CUDA kernels are not compiled'


def needs_memory(gigabytes):
    """Mark of a test that takes as much memory of the GPU."""
    total = torch.cuda.get_device_properties(0).total_memory if not why_not() else 0
    return pytest.mark.skipif(total < gigabytes * 1e9,
                              reason=f'needs a GPU with {gigabytes} GB of memory')


on_a_gpu = [pytest.mark.cuda, pytest.mark.skipif(bool(why_not()), reason=why_not() or 'a GPU'),
            pytest.mark.usefixtures('poisoned_memory')]


def set_fast(on=None):
    """Turns the tensor-core kernels on or off; None: as MMDCNV4_FAST says."""
    torch.ops.mmdcnv4._set_cuda_fast(proven.choice() if on is None else str(int(on)))


def on_gpu(value, offset_mask, **geometry):
    """`dcnv4` of CPU tensors, computed on the GPU."""
    return dcnv4(value.to(DEVICE), offset_mask.to(DEVICE), backend='native', **geometry).cpu()


def gpu_inputs(size=(2, 9, 7, 2, 16), dtypes=(F32, F32), **geometry):
    inputs, grad_output = make_call(size, dtypes, geometry or SAME)
    return inputs.value.to(DEVICE), inputs.offset_mask.to(DEVICE), grad_output.to(DEVICE)


def gradients(value, offset_mask, grad_output, **options):
    """Output and gradients of a call on the GPU."""
    value, offset_mask = (t.detach().requires_grad_() for t in (value, offset_mask))
    output = dcnv4(value, offset_mask, **options)
    return (output, *torch.autograd.grad(output, (value, offset_mask), grad_output))


def losses(dtype, may_be_fast=True):
    """What tensor-core kernels may lose, for error_bounds()."""
    if not may_be_fast or dtype not in DOTS:
        return {}
    return dict(weight_error=BACKWARD_WEIGHTS[dtype], dot_error=DOTS[dtype])


def assert_all(actual, inputs, grad_output, may_be_fast=True, **geometry):
    """Compares output and gradients with the reference."""
    assert all(tensor.isfinite().all() for tensor in actual)
    assert_accurate(actual, inputs, grad_output, **losses(inputs.value.dtype, may_be_fast),
                    **geometry)


def assert_matches_reference(inputs, **geometry):
    """Computes a call by the kernels that MMDCNV4_FAST chooses and compares it."""
    grad_output = random_grad_output(inputs)
    assert_all(forward_backward(on_gpu, inputs, grad_output, **geometry), inputs, grad_output,
               may_be_fast=proven.choice() != '0', **geometry)


def check(inputs, grad_output, **geometry):
    """Computes a call on the GPU and compares it with the reference."""
    assert_all(forward_backward(on_gpu, inputs, grad_output, **geometry), inputs, grad_output,
               **geometry)
