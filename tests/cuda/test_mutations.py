# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The tables of faults fit the sources and the tests as they are; `make mutate` tries them."""

from __future__ import annotations

import re
from pathlib import Path

import mutants_cpu
import mutants_direct
import mutants_float
import mutants_forward
import mutants_window
import pytest

from helpers.faults import Fault

ROOT = Path(__file__).parents[2]
TABLES = dict(window=mutants_window.FAULTS, forward=mutants_forward.FAULTS,
              float=mutants_float.FAULTS, direct=mutants_direct.FAULTS, cpu=mutants_cpu.FAULTS)


@pytest.mark.parametrize('name', TABLES)
def test_tables(name):
    """Each fault can be made, in a way that the compiler sees, and its tests exist."""
    for fault in TABLES[name]:
        assert (ROOT / fault.file).read_text().count(fault.right) == 1, fault.name
        assert fault.right != fault.wrong and fault.tests, fault.name
        assert fault.units and all((ROOT / unit).is_file() for unit in fault.units), fault.name
        for test in fault.tests:
            file, _, function = re.sub(r'\[.*', '', test).partition('::')
            assert f'def {function}(' in (ROOT / file).read_text(), (fault.name, test)


def test_there_are_enough_of_them():
    names = [fault.name for faults in TABLES.values() for fault in faults]
    assert len(set(names)) == len(names)
    assert sum(map(len, TABLES.values())) - len(TABLES['cpu']) >= 320
    assert len(TABLES['cpu']) >= 30


def test_a_fault_is_put_into_a_copy(tmp_path):
    (tmp_path / 'a.cpp').write_text('one two')
    assert Fault('a', 'a.cpp', 'two', 'three', ()).put_into(tmp_path) == 'one two'
    assert (tmp_path / 'a.cpp').read_text() == 'one three'
    with pytest.raises(ValueError, match='must occur once in a.cpp, found 0 times'):
        Fault('b', 'a.cpp', 'two', 'three', ()).put_into(tmp_path)
