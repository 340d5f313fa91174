# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of the CPU run, at their smallest; those of the GPU have tests in tests/cuda."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[1] / 'benchmarks'


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f'benchmark_{name}', BENCHMARKS / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_ablation(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip('mmcv')
    module = load('ablation')
    times = module.main(['--shape', '1', '5', '7', '16', '--groups', '2', '--repeats', '1',
                         '--device', 'cpu'])
    assert all(seconds > 0 for seconds in times.values())
    singles = {name for name in module.PUBLISHED if 'float16' not in name}
    assert singles <= set(times), 'every published figure of single precision has its row'
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 2 + len(times)
    assert rows[2].split()[-1] == module.PUBLISHED[next(iter(times))]


def test_attention(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip('mmcv')
    times = load('attention').main(['--shape', '1x9x10', '--width', '4', '--repeats', '1'])
    assert len(times) >= 2 and all(seconds > 0 for seconds, _ in times.values())
    printed = capsys.readouterr().out
    assert all(name in printed for name in times)


def test_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
             capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / 'figures.json'
    monkeypatch.setattr(sys, 'argv', ['cpu.py', '--shapes', '1x5x7x16/8', '--threads', '1',
                                      '--seconds', '0.01', '--no-memory', '--json', str(file)])
    load('cpu').main()
    assert '1x5x7x16' in json.dumps(json.loads(file.read_text()))
    assert '1x5x7x16' in capsys.readouterr().out


@pytest.mark.parametrize('name, arguments, row', [
    ('dynamic_convolutions', ['--arch', 'xxs', '--batch', '2', '--size', '32', '--repeats', '1'],
     'dynamic'),
    ('host_time', ['--rounds', '1', '--calls', '1'], 'dcnv4')])
def test_prints_its_rows(name: str, arguments: list[str], row: str,
                         monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip('mmcv')
    monkeypatch.setattr(sys, 'argv', [f'{name}.py', *arguments])
    load(name).main()
    assert any(row in line.lower() and any(c.isdigit() for c in line)
               for line in capsys.readouterr().out.splitlines())
