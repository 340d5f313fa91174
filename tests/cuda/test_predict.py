# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The predicted times: order, floors, and what an emulator and hardware counters have counted."""

from __future__ import annotations

import importlib
import re
import types
from pathlib import Path

import pytest
import torch

from helpers.cuda_cases import F16, make_call
from helpers.emulate import ONE_PROCESSOR, emulate_window, emulate_window_backward
from mmdcnv4.ops import _extension

ROOT = Path(__file__).parents[2]
needs_extension = pytest.mark.skipif(not _extension.is_available, reason='no compiled kernels')
DIRECTIONS = ('forward', 'backward')


@pytest.fixture
def tools(monkeypatch):
    """The programs' modules, which are no package."""
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    monkeypatch.syspath_prepend(str(ROOT / 'dev' / 'cuda'))
    return types.SimpleNamespace(**{name: importlib.import_module(name) for name in (
        'predict', 'executions', 'far_taps', 'machine_code')})


def times(tools, direction, path, offsets=('D1',), shapes=('64x28x28x256',), dtype='float16'):
    predict, table = tools.predict, tools.executions.read_compiled()
    calls = [predict.Call(shape, 32, dtype, name, direction, path)
             for shape in shapes for name in offsets]
    gpu = predict.GPUS['h200']
    return [(predict.predicted(gpu, call, table), predict.floor_of(gpu, call)) for call in calls]


@needs_extension
@pytest.mark.parametrize('path', ['direct', 'tensor cores'])
@pytest.mark.parametrize('direction', DIRECTIONS)
def test_order_and_floors(tools, direction, path):
    """More images take longer, so do taps further away; nothing beats its bytes."""
    shapes = [f'{batch}x28x28x256' for batch in (8, 16, 32, 64)]
    by_size = [time for time, _ in times(tools, direction, path, shapes=shapes)]
    assert by_size == sorted(by_size) and by_size[-1] > 4 * by_size[0]
    by_offsets = [time for time, _ in times(tools, direction, path, ('D0', 'D1', 'D2'))]
    assert by_offsets == sorted(by_offsets)
    if path == 'tensor cores':
        assert by_offsets[0] < by_offsets[1] < by_offsets[2]
    small = ('64x7x7x1024', '1x25x40x1024', '1x50x80x512')
    assert all(time > floor for time, floor in times(tools, direction, path, ('D0', 'D4'), small))


@needs_extension
def test_against_counters(tools):
    """Waves and instructions that ncu counted of the direct kernels, which have not changed since.

    Instructions in the code are less than those executed: a loop that waits, a replay.
    """
    predict, table = tools.predict, tools.executions.read_compiled()
    text = (ROOT / 'benchmarks/results/nvidia-h200-20261127-first-contact.md').read_text()
    for direction in DIRECTIONS:
        cells = re.search(rf'\| dcnv4_{direction}_kernel \|(.*)', text)[1].split('|')
        call = predict.Call('64x56x56x128', 32, 'float16', 'D1', direction, 'direct')
        launch = next(terms for terms in predict.predict(predict.GPUS['h200'], call, table)
                      if terms.name == direction)
        assert launch.waves == pytest.approx(float(cells[8]), abs=0.01)
        assert 0.94 < launch.instructions / float(cells[1]) < 1.01


@pytest.mark.slow
@needs_extension
def test_measured_rows(tools, capsys):
    """Each row of the results that is ours stands beside its prediction, which is no guess."""
    assert tools.predict.main(['--measured']) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    ratios = [float(row[-1]) for row in rows if row and re.fullmatch(r'\d+x\d+x\d+x\d+', row[0])]
    assert len(ratios) == len(tools.predict.read_measured(tools.predict.GPUS['h200'])) >= 32
    assert all(0.7 < ratio < 1.3 for ratio in ratios)


def test_the_table_is_whole(tools):
    """All kernels that calls of the benchmark take, with parts that are known to run."""
    table = tools.executions.read_compiled()
    rates = tools.far_taps.far_rates(8, 8, 32, 'D1')
    for (direction, shape, _, _), kernel in table.items():
        depth = int(re.search(r'D=(\d+)|$', shape)[1] or 32)
        reach = 4 if shape.endswith('4') and 'reach' in shape else 2
        is_window = direction.startswith('window') and 'reach' in shape
        launch = tools.executions.Launch(direction, depth, 2, 256, 512, *(
            (8, 8, reach, 8, rates) if is_window else ()))
        assert tools.executions.instructions(kernel, launch) > 0
        if is_window:
            assert {'lines', 'copies', 'units' if 'value' not in direction else 'stencils'} <= \
                kernel.parts.keys()
    assert {arch for *_, arch in table} == {'sm_80', 'sm_90', 'sm_100'}
    assert len(table) == 3 * (2 * 3 * 3 + 3 * 3 * 2 * 2 + 1 + 2)


def test_a_stale_table(tools, tmp_path):
    path = tmp_path / 'compiled.md'
    path.write_text('| kernel | shape |\n')
    with pytest.raises(SystemExit, match=r'check_ptxas.py --write makes it'):
        tools.executions.read_compiled(path)
    kernel = tools.executions.Kernel(64, {'warps': 1.0, 'unheard_of': 2.0})
    with pytest.raises(ValueError, match='unheard_of'):
        tools.executions.instructions(kernel, tools.executions.Launch('forward', 32, 1, 32, 8))


def test_parts_of_machine_code(tools):
    """A loop of units with rounds within, taps gathered behind a branch, and copies before."""
    lines = ['MOV', '@!P0 BRA 0x40', 'LDGSTS.E', '@P1 BRA 0x20',  # 0x20: a copy at a time
             'MOV', 'HMMA.16816', '@P0 BRA 0x90', 'SHFL.IDX', 'LDG.E.128',  # 0x40: units
             'MOV', 'HMMA.16816', '@P2 BRA 0x90',  # 0x90: rounds
             'STG.E', '@P3 BRA 0x40', 'EXIT', 'MOV']
    lines[7] += ' F2I'  # of the stretch that is skipped
    code = [(16 * i, line) for i, line in enumerate(lines)]
    assert tools.machine_code.parts_of(code, 'window_forward', 8, 32) == {
        'warps': 2, 'copies': 2, 'units': 5, 'fetches': 2, 'rounds': 3}


@pytest.mark.parametrize('depth', [16, 64])
def test_nothing_is_far_at_rest(tools, depth):
    """Not even the taps of border pixels, which lie exactly on line or column -1."""
    rates = tools.far_taps.far_rates(5, 7, depth, 'D0')
    assert rates[:10] == (0.0,) * 9 + (False,)
    assert rates.window_conflicts == rates.stencil_conflicts == 1


@pytest.mark.parametrize('spread', [0.3, 0.5, 2])
def test_rates_against_the_emulator(tools, emulator, tmp_path, spread):
    """Rounds, left-over taps, lists and wavefronts, as the kernels' own source has them."""
    size, geometry = (1, 8, 16, 2, 32), dict(kernel_size=3, padding=1)
    inputs, grad_output = make_call(size, (F16, F16), geometry, seed=1)
    packed = inputs.offset_mask[..., :54].unflatten(-1, (2, 27))
    packed[..., :18] = torch.randn(packed[..., :18].shape) * spread
    if spread < 0.5:  # none is far
        packed[..., :18].clamp_(-0.9, 0.9)
    options = dict(groups=2, device=ONE_PROCESSOR, count=True, **geometry)
    _, plan, forward = emulate_window(emulator, tmp_path / 'a', inputs, **options)
    _, run = emulate_window_backward(emulator, tmp_path / 'b', inputs, grad_output, **options)
    far_taps, rows = tools.far_taps, 8 * 16 * 2
    rates = far_taps.rates_of(far_taps.taps_of(packed[0].float(), 1.0), 32, 2)
    assert rates.rounds * rows == forward['far']['instructions'] / 4  # two chunks out and back
    # a word for each turn of collecting; of taking, one read and three numbers put
    far = run.accesses['far']['instructions']
    assert (rates.collects + 4 * rates.takes) * rows == pytest.approx(far)
    assert rates.listed * rows == pytest.approx(run.listed)
    assert rates.has_full == bool(run.has_full)
    if rates.collects:  # lanes that part meet in other orders than on a device
        return

    def predicted(direction, plan):
        blocks = plan['slices'] * plan['tiles_h'] * plan['tiles_w']
        return tools.executions.shared_wavefronts(tools.executions.Launch(
            direction, 32, blocks, plan['threads'], rows, plan['tile_h'], plan['tile_w'],
            plan['reach'], rows // 16, rates))

    def wavefronts(counts):
        return sum(count['wavefronts'] for count in counts.values())

    def conflicts(phase):
        return run.accesses[phase]['wavefronts'] / run.accesses[phase]['instructions']

    assert predicted('window_forward', plan) == pytest.approx(wavefronts(forward), rel=0.1)
    assert rates.window_conflicts == pytest.approx(conflicts('taps'))
    # more than there are: on so small a map many pixels of the halo do not exist
    assert 1 < rates.stencil_conflicts / conflicts('scatter') < 1.25
    both = sum(predicted(*pair) for pair in (('window_grad_offset', run.offset_mask_plan),
                                             ('window_grad_value', run.value_plan)))
    assert wavefronts(run.accesses) < both < 1.2 * wavefronts(run.accesses)
