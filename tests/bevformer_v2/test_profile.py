# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The profile of a step, part by part, on a small model and small images."""

from __future__ import annotations

import importlib
import sys

import pytest

from helpers.bevformer import ROOT, TINY

HEADS = ['decoder and its loss', 'perspective head and its loss']
MAPS = ['backbone and neck', 'BEV encoder']
COLUMNS = ('calls', 'seconds', 'memory', 'peak')


@pytest.fixture
def table(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / 'benchmarks'))
    program = importlib.import_module('bevformer_v2')

    def run(*arguments):
        monkeypatch.setattr(sys, 'argv', ['', str(TINY), '--scale', '0.16', *arguments])
        program.main()
        rows = [line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines()
                if line.startswith('| ')][2:]
        return {name: dict(zip(COLUMNS, map(float, values))) for name, *values in rows}
    yield run
    del sys.modules['bevformer_v2']


def check_sums(rows):
    """The parts follow one another and are nearly all there is."""
    rows = dict(rows)
    total = rows.pop('all')
    assert 0.6 * total['seconds'] < sum(row['seconds'] for row in rows.values()) \
        < 1.01 * total['seconds'] + 0.01 * len(rows)
    peaks = [row['peak'] for row in (*rows.values(), total)]
    assert peaks == sorted(peaks) and all(row['memory'] <= row['peak'] for row in rows.values())


@pytest.mark.parametrize('options', [[], ['--with-cp', '--bfloat16']])
def test_training_step(table, options):
    """A frame of history and the current one; then backward through the same parts."""
    rows = table('--train', *options)
    parts = [*MAPS, 'fusion', *HEADS]
    assert list(rows) == [*(f'{name}, history' for name in MAPS), *parts,
                          *(f'{name}, backward' for name in reversed(parts)), 'all']
    assert all(row['calls'] == 1 for row in rows.values())
    assert all(rows[f'{name}, backward']['seconds'] > 0 for name in parts)
    check_sums(rows)


@pytest.mark.parametrize('cached', [True, False])
def test_prediction(table, cached):
    rows = table(*(['--cached'] if cached else []))
    calls = dict(zip([*MAPS, 'fusion', 'decoder', 'all'], [1 if cached else 2, 2, 1, 1, 1]))
    assert {name: row['calls'] for name, row in rows.items()} == calls
    check_sums(rows)
