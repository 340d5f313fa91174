# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The launch plan of the paper's shapes, asked for through torch without a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from mmdcnv4.ops import _extension, offset_mask_channels

SHAPES = [(64, 56, 56, 128), (64, 28, 28, 256), (64, 14, 14, 512), (64, 7, 7, 1024),
          (64, 14, 14, 768), (1, 200, 320, 128), (1, 100, 160, 256), (1, 50, 80, 512),
          (1, 25, 40, 1024), (1, 64, 64, 768)]

pytestmark = pytest.mark.skipif(not _extension.is_available, reason='no compiled kernels')


def plan(shape, depth, dtype, backward=False, multiprocessors=132):
    groups = shape[3] // depth
    value = torch.empty(shape, dtype=dtype, device='meta')
    packed = torch.empty(*shape[:3], offset_mask_channels(groups, 9), dtype=dtype, device='meta')
    return json.loads(torch.ops.mmdcnv4._dcnv4_launch_plan(
        value, packed, [3, 3], groups, [1, 1], [1, 1], [1, 1], 1.0, False, False, backward,
        multiprocessors))


@pytest.mark.parametrize('backward', [False, True])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
@pytest.mark.parametrize('depth', [16, 32])
@pytest.mark.parametrize('shape', SHAPES, ids=lambda shape: 'x'.join(map(str, shape)))
def test_shapes_of_the_paper(shape, depth, dtype, backward):
    """Full vectors, whole cache lines, two-dimensional tiles, and few idle threads."""
    p = plan(shape, depth, dtype, backward)
    assert p['vec'] == (4 if backward else 16 // dtype.itemsize)
    assert p['team'] * p['vec'] == depth
    assert p['groups_per_block'] * depth * dtype.itemsize >= 128
    computed = p['tiles_h'] * p['tile_h'] * p['tiles_w'] * p['tile_w']
    assert computed <= 1.35 * shape[1] * shape[2]
    assert p['slices'] * p['groups_per_block'] == shape[3] // depth
    blocks = shape[0] * p['tiles_h'] * p['tiles_w'] * p['slices']
    assert blocks >= 2 * 132 or p['threads'] == 64
    if shape[1] >= 25:
        assert min(p['tile_h'], p['tile_w']) >= 2


def test_plan_checks_its_inputs():
    value = torch.empty(1, 4, 4, 6, device='meta')
    with pytest.raises((RuntimeError, ValueError), match='groups must divide'):
        torch.ops.mmdcnv4._dcnv4_launch_plan(value, value, [3, 3], 4, [1, 1], [1, 1], [1, 1], 1.0,
                                             False, False, False, 132)
    value = torch.empty(1, 2**17, 2**16, 8, dtype=torch.float16, device='meta')
    packed = torch.empty(1, 2**17, 2**16, 8, dtype=torch.float16, device='meta')
    with pytest.raises((RuntimeError, ValueError), match=r'fewer than 2\*\*32 pixels'):
        torch.ops.mmdcnv4._dcnv4_launch_plan(value, packed, [1, 1], 1, [1, 1], [0, 0], [1, 1], 1.0,
                                             False, False, False, 132)
    value = torch.empty(1, 1, 4, 8, dtype=torch.float16, device='meta')
    packed = torch.empty(1, 2**31 + 1, 4, 8, dtype=torch.float16, device='meta')
    with pytest.raises((RuntimeError, ValueError), match=r'output must have sides <= 2\*\*30'):
        torch.ops.mmdcnv4._dcnv4_launch_plan(value, packed, [1, 1], 1, [1, 1], [2**30, 0], [1, 1],
                                             1.0, False, False, False, 132)
