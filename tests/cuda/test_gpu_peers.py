# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the GPU benchmark compares: that its peers compute the same function, and its floors."""

from __future__ import annotations

import contextlib
import gc
import importlib
import itertools
import json
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmdcnv4.ops import _extension, dcnv4_reference

CACHE = 20_000  # bytes of the L2 cache of a GPU that is not there
BENCHMARKS = Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module('gpu_peers'), importlib.import_module('gpu')


@pytest.fixture
def report(tools, tmp_path):
    return sys.modules['gpu_report'].Report(HEAD, tmp_path / 'report')


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


HEAD = dict(device='a GPU', torch='2.11', python='3.12', copy_bytes_per_second=4e12,
            launch_seconds=1.5e-6, peers=['ours', 'ours fast', 'official', 'mmcv', 'torchvision'],
            absent={'mmcv': 'not there'}, state_before='cold')


def make_row(direction='forward', dtype='float16', **changes):
    return dict(dict(shape='64x56x56x128', group_channels=32, dtype=dtype, offsets='D1',
                     direction=direction, bytes=4_000_000, wrong_pixels=dict(official=0.031),
                     peers={'ours': dict(device_ms=0.002, host_ms=0.02, spread=0.011),
                            'ours fast': dict(device_ms=0.0016),
                            'official': dict(device_ms=0.009), 'mmcv': dict(error='no')}),
                **changes)


def test_table(report):
    (row,) = rows = [make_row()]
    report.add(rows)
    assert row['floor_us'] == pytest.approx(1.5)  # of a launch: the copy would take 1 µs
    line = report.line(row)
    assert '2.0 (75% of floor)' in line and '9.0 (4.50x) WRONG 3.1%' in line
    assert '1.6 (0.80x)' in line and 'error | ' in line and line.endswith('  1.1%')
    assert report.line(row, 'host_ms').count(' - ') == 3
    assert report.summary()[1:] == ['float16 32 D1 forward: ours 75% of floor (75), '
                                    'ours fast 94% of floor (94), official 5.6x (5.6)']
    assert report.is_right()


def test_our_own_mistakes_fail(report):
    report.add([make_row(wrong_pixels={'ours fast': 0.5})])
    assert not report.is_right() and 'FAILED' in ' '.join(report.finish(left=0))
    report.rows = [make_row(peers=dict(ours=dict(error='illegal access')))]
    assert report.problems() == ['64x56x56x128 32 float16 D1 forward: ours: illegal access']


def test_report_is_resumed(tools, report):
    report.add([make_row(), make_row('backward')])
    path = report.stem.with_suffix('.json')
    again = type(report).resume(path, HEAD)
    assert again.rows == report.rows and again.stem == report.stem
    assert again.has(make_row()) and not again.has(make_row(offsets='D0'))
    with pytest.raises(SystemExit, match="device 'a GPU', here it is 'another'"):
        type(report).resume(path, dict(HEAD, device='another'))


def test_shape_argument(tools):
    _, benchmark = tools
    assert benchmark.parse_shape('1x200x320x128') == (1, 200, 320, 128)
    with pytest.raises(benchmark.argparse.ArgumentTypeError, match='NxHxWxC'):
        benchmark.parse_shape('1x200x320')


def test_without_a_gpu(tools, monkeypatch, capsys):
    _, benchmark = tools
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert benchmark.main([]) == 1
    assert 'sees no GPU' in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.delitem(_extension.build_info, 'cuda', raising=False)
    assert benchmark.main([]) == 1
    assert 'not compiled' in capsys.readouterr().err


def test_plot(report):
    pytest.importorskip('matplotlib')
    report.add([make_row(direction, dtype) for direction in ('forward', 'backward')
                for dtype in ('float16', 'float32')])
    assert report.finish(left=2)[-1].endswith('.png')
    assert report.stem.with_suffix('.png').stat().st_size > 1000


class Clock:
    """In place of CUDA events: whatever runs takes half a millisecond."""

    def __init__(self, enable_timing=False):
        assert enable_timing

    def record(self):
        pass

    def elapsed_time(self, other):
        return 0.5


class Graph:
    """In place of a CUDA graph; fails as a peer that synchronises would."""

    fails = False

    def replay(self):
        pass


@contextlib.contextmanager
def captured(graph):
    if Graph.fails:
        raise RuntimeError('operation not permitted when stream is capturing\nand more')
    yield


@pytest.fixture
def fake_gpu(tools, monkeypatch):
    """Lets the benchmark run on the CPU; its times mean nothing then."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in dict(
            is_available=lambda: True, get_device_name=lambda: 'Fake GPU', Event=Clock,
            get_device_properties=lambda device: SimpleNamespace(L2_cache_size=CACHE),
            CUDAGraph=Graph, graph=captured, Stream=lambda: stream, set_stream=lambda stream: None,
            current_stream=lambda: stream, stream=contextlib.nullcontext,
            synchronize=lambda: None, empty_cache=lambda: None).items():
        monkeypatch.setattr(torch.cuda, name, value)
    benchmark, copy_bandwidth = tools[1], tools[1].copy_bandwidth
    monkeypatch.setattr(benchmark, 'copy_bandwidth', lambda device: copy_bandwidth(device, 9))
    monkeypatch.setattr(benchmark, 'DEVICE', 'cpu')
    monkeypatch.setattr(sys.modules['gpu_timing'], 'LONGEST_LOOP', 1)
    monkeypatch.setitem(_extension.build_info, 'cuda', {})
    return benchmark


@pytest.mark.skipif(not _extension.is_available, reason='no kernels')
def test_the_whole_benchmark(fake_gpu, tmp_path, monkeypatch, capsys):
    arguments = ['--shapes', '1x5x7x32', '2x3x3x32', '--group-channels', '16', '--offsets', 'D1',
                 '--dtypes', 'float16', 'float32', '--output', str(tmp_path), '--peers', 'ours',
                 'ours fast', 'attention']
    assert fake_gpu.main([*arguments, '--budget', '0']) == 1  # measured nothing
    assert 'problems are left' in capsys.readouterr().out
    (path,) = tmp_path.glob('*.json')
    assert fake_gpu.main([*arguments, '--resume', str(path)]) == 0
    report = json.loads(path.read_text())
    measured = [(row['shape'], row['dtype'], row['direction']) for row in report['rows']]
    assert sorted(measured) == sorted(itertools.product(
        arguments[1:3], ('float16', 'float32'), ('forward', 'backward')))
    assert report['device'] == 'Fake GPU'
    for row in report['rows']:
        if row['direction'] == 'forward':  # the sets of inputs do not fit into the cache together
            assert row['input_sets'] * row['bytes'] >= 3 * CACHE
            assert (row['input_sets'] - 1) * row['bytes'] < 3 * CACHE
        assert row['wrong_pixels']['ours'] == 0
        assert {'device_ms', 'hot_ms', 'host_ms', 'spread', 'calls', 'replays'} == set(
            row['peers']['ours'])
        assert 'ours fast' in row['peers']
    assert 'Host time' in path.with_suffix('.txt').read_text()

    monkeypatch.setattr(Graph, 'fails', True)
    monkeypatch.setattr(fake_gpu, 'launch_time', lambda device: 1e-6)
    assert fake_gpu.main(arguments) == 1
    assert 'FAILED 1x5x7x32 16 float16 D1 forward: ours: operation' in capsys.readouterr().out


def test_a_peer_may_refuse(fake_gpu, monkeypatch):
    """A type that a peer is not made for costs its own column, not the run."""
    peers = sys.modules['gpu_peers']

    def refuse(problem):
        raise RuntimeError('"deform_conv2d" not implemented for BFloat16')
    monkeypatch.setitem(peers.PEERS, 'torchvision', peers.Peer(refuse, is_same=True))
    rows = fake_gpu.measure_case(fake_gpu.Case('1x5x7x32', 16, 'bfloat16', 'D0'),
                                 ['torchvision', 'attention'], {})
    assert [row['peers']['torchvision']['error'] for row in rows] == 2 * [
        '"deform_conv2d" not implemented for BFloat16']
    assert all('device_ms' in row['peers']['attention'] for row in rows)


def test_what_depends_on_the_shape_alone_is_measured_once(fake_gpu, monkeypatch):
    known = {}
    case = fake_gpu.Case('1x5x7x32', 16, 'float32', 'D0')
    first = fake_gpu.measure_case(case, ['attention'], known)
    monkeypatch.setitem(sys.modules['gpu_peers'].PEERS, 'attention',
                        sys.modules['gpu_peers'].Peer(lambda problem: pytest.fail('again')))
    second = fake_gpu.measure_case(case._replace(offsets='D1'), ['attention'], known)
    assert [row['peers'] for row in first] == [row['peers'] for row in second]


@pytest.mark.skipif(not _extension.is_available, reason='no kernels')
def test_a_graph_keeps_what_it_reads(fake_gpu, monkeypatch):
    """The memory of an unused tensor goes back to the device, and a replay would read it."""
    timing, peers = sys.modules['gpu_timing'], sys.modules['gpu_peers']
    made, real = [], torch.randn_like

    def randn_like(tensor):
        made.append(weakref.ref(grad := real(tensor)))
        return grad
    monkeypatch.setattr(torch, 'randn_like', randn_like)
    problem = peers.make_problem((1, 5, 7, 32), 16, torch.float32, 'D1', device='cpu')
    graphs, _ = timing.prepare([peers.ours(problem)], with_backward=True)
    gc.collect()
    assert made and all(reference() is not None for reference in made)
    del graphs
    gc.collect()
    assert not any(reference() is not None for reference in made)
