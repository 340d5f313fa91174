# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU, in every dtype, against the reference in float64.

Skipped without a GPU. `make test-gpu` builds the kernels, runs this file and more, and fails
where there is no GPU. These tests take the kernels that a user gets: the
direct ones, or with MMDCNV4_FAST=1 those on tensor cores where they are made for a call.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.cuda_cases import DTYPES, F16, F32, F64, SIZES, hostile_offsets, make_call, size_name
from helpers.gpu_cases import (
    DEVICE,
    NAMES,
    SAME,
    assert_matches_reference,
    check,
    gpu_inputs,
    gradients,
    needs_memory,
    on_a_gpu,
    on_gpu,
)
from mmdcnv4.ops import dcnv4, dcnv4_reference
from mmdcnv4.ops.contract import make_geometry
from mmdcnv4.testing import GEOMETRIES

GOLDEN = Path(__file__).parents[1] / 'data' / 'dcnv4_op.npz'
LARGE = [(2, 56, 56, 4, 16), (3, 14, 14, 16, 32), (2, 7, 7, 80, 16), (1, 33, 65, 8, 48)]

pytestmark = on_a_gpu


@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('name', GEOMETRIES)
def test_geometries(name, dtypes):
    inputs, _ = make_call((2, 9, 13, 3, 16), DTYPES[dtypes], GEOMETRIES[name])
    assert_matches_reference(inputs, groups=3, **GEOMETRIES[name])


@pytest.mark.ragged
@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('size', SIZES, ids=size_name)
def test_sizes(size, dtypes):
    inputs, _ = make_call(size, DTYPES[dtypes], SAME)
    assert_matches_reference(inputs, groups=size[3], **SAME)


@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('size', LARGE, ids=size_name)
def test_large_sizes(size, dtypes):
    inputs, _ = make_call(size, DTYPES[dtypes], SAME)
    assert_matches_reference(inputs, groups=size[3], **SAME)


@pytest.mark.parametrize('dtypes', ['f16', 'bf16-f32'])
@pytest.mark.parametrize('side, groups', [(56, 10), (28, 20), (14, 40), (7, 80)])
def test_flash_intern_image_large(both_paths, side, groups, dtypes):
    """The four stages of FlashInternImage-L for an image of 224 x 224 pixels."""
    geometry = dict(SAME, offset_scale=2.0)
    inputs, grad_output = make_call((1, side, side, groups, 16), DTYPES[dtypes], geometry)
    check(inputs, grad_output, groups=groups, **geometry)


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
    check(hostile_offsets(inputs, make_geometry(**geometry).points), grad_output, **geometry)


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


@needs_memory(40)
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
