# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmark compares: that its peers compute the same function, and its floors."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from mmdcnv4.ops import _extension, dcnv4_reference

TOOLS = Path(__file__).parents[2] / 'tools'


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module('gpu_peers'), importlib.import_module('benchmark_gpu')


def problem(peers, offsets, dtype=torch.float32):
    return peers.make_problem((2, 5, 7, 64), 16, dtype, offsets, device='cpu')


@pytest.mark.parametrize('offsets', ['D0', 'D1', 'D2', 'D3', 'D4'])
@pytest.mark.parametrize('name', ['ours', 'ours fast', 'torchvision', 'mmcv'])
def test_peers_compute_the_same(tools, name, offsets):
    peers, benchmark = tools
    if peers.absent(name):
        pytest.skip(peers.absent(name))
    if name.startswith('ours') and not _extension.is_available:
        pytest.skip(_extension.missing_reason)
    inputs = problem(peers, offsets)
    call = peers.PEERS[name].make(inputs)
    exact = benchmark.exact_output(inputs)
    assert benchmark.wrong_pixels(call, exact, benchmark.GATE['float32']) == 0
    # the gate sees one wrong pixel of seventy
    exact[1, 2, 3, 4] += exact.abs().max()
    assert benchmark.wrong_pixels(call, exact, 0.1) == pytest.approx(1 / 70)
    grads = torch.autograd.grad(call.run().sum(), call.leaves)
    assert all(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize('name', ['depthwise 7x7 nchw', 'depthwise 7x7 nhwc', 'attention'])
def test_other_peers_run(tools, name):
    peers, _ = tools
    call = peers.PEERS[name].make(problem(peers, 'D1'))
    assert call.run().numel() == 2 * 5 * 7 * 64
    assert torch.autograd.grad(call.run().sum(), call.leaves)[0].abs().sum() > 0


def test_distributions(tools):
    peers, _ = tools
    first, last = problem(peers, 'D0'), problem(peers, 'D3')
    assert first.offset_scale == 1 and last.offset_scale == 2
    same = dict(kernel_size=3, padding=1, groups=4)
    still = dcnv4_reference(first.value, first.offset_mask.clone(), **same)
    packed = first.offset_mask[..., :108].unflatten(-1, (4, 27))
    assert (packed[..., :18] == 0).all() and still.abs().sum() > 0
    assert last.offset_mask[..., :18].abs().max() <= 2
    with pytest.raises(ValueError, match="got 'D9'"):
        problem(peers, 'D9')


def test_floors(tools):
    """Bytes of the largest shape: 64x56x56 pixels, 128 channels, 4 groups of 27 numbers, to 112."""
    peers, benchmark = tools
    pixels = 64 * 56 * 56
    inputs = peers.Problem(torch.empty(64, 56, 56, 128, device='meta'),
                           torch.empty(64, 56, 56, 112, device='meta'), 4, 1.0)
    assert inputs.bytes_moved == pixels * (2 * 128 + 112) * 4
    assert inputs.bytes_moved_backward == pixels * (3 * 128 + 2 * 112) * 4
    row = dict(shape='64x56x56x128', group_channels=32, dtype='float32', offsets='D1',
               direction='forward', bytes=4_000_000, wrong_pixels=dict(official=0.031),
               peers=dict(ours=dict(device_ms=0.002), official=dict(device_ms=0.009),
                          mmcv=dict(error='no')))
    line = benchmark.table_line(row, 4e12, ['ours', 'official', 'mmcv', 'torchvision'])
    assert '2.0 (50% of floor)' in line and '9.0 (4.50x) WRONG 3.1%' in line
    assert line.count(' - ') + line.endswith('-') == 2


def test_shape_argument(tools):
    _, benchmark = tools
    assert benchmark.parse_shape('1x200x320x128') == (1, 200, 320, 128)
    with pytest.raises(benchmark.argparse.ArgumentTypeError, match='NxHxWxC'):
        benchmark.parse_shape('1x200x320')


def test_without_a_gpu(tools, monkeypatch, capsys):
    _, benchmark = tools
    monkeypatch.setattr(sys, 'argv', ['benchmark_gpu.py'])
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert benchmark.main() == 1
    assert 'sees no GPU' in capsys.readouterr().err


def test_plot(tools, tmp_path):
    _, benchmark = tools
    pytest.importorskip('matplotlib')
    rows = [dict(shape='1x7x7x64', group_channels=16, dtype='float16', offsets='D1',
                 direction=direction, peers=dict(ours=dict(device_ms=0.1)))
            for direction in ('forward', 'backward')]
    assert benchmark.draw(rows, ['ours', 'mmcv'], tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').stat().st_size > 1000
