# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""When the tensor-core kernels are trusted: the table, this machine's verdicts, the variable."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import pytest

from mmdcnv4.ops import proven

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(proven, 'driver', lambda: '580.1')
    monkeypatch.setattr(proven, 'PROVEN', (proven.Proof('aa', 90, 'some.md'),))
    return tmp_path / 'mmdcnv4' / 'kernels.json'


@pytest.mark.parametrize('text, expected', [(None, 'auto'), ('', 'auto'), ('auto', 'auto'),
                                            ('0', '0'), ('1', '1')])
def test_choice(monkeypatch, text, expected):
    monkeypatch.delenv('MMDCNV4_FAST', raising=False)
    if text is not None:
        monkeypatch.setenv('MMDCNV4_FAST', text)
    assert proven.choice() == expected


def test_a_wrong_choice_is_named(monkeypatch):
    monkeypatch.setenv('MMDCNV4_FAST', 'yes')
    with pytest.raises(ValueError, match="MMDCNV4_FAST must be one of auto, 0, 1, got 'yes'"):
        proven.choice()


def test_the_table_counts_for_its_kernels_alone():
    assert proven.reasons('aa') == {90: (True, 'benchmarks/results/some.md')}
    assert proven.reasons('bb') == {}


def test_a_verdict_is_kept_and_replaced(cache):
    assert proven.write_verdict('bb', 80, 'A GPU', True) == cache
    proven.write_verdict('bb', 86, 'Another GPU', False)
    proven.write_verdict('bb', 80, 'A GPU', False)
    assert {key: value[0] for key, value in proven.reasons('bb').items()} == {80: False, 86: False}
    assert len(json.loads(cache.read_text())) == 2
    assert [path.name for path in cache.parent.iterdir()] == ['kernels.json']


def test_a_verdict_against_the_kernels_wins_over_the_table():
    proven.write_verdict('aa', 90, 'A GPU', False)
    assert proven.reasons('aa')[90][0] is False


@pytest.mark.parametrize('name', ['driver', 'kernels', 'torch'])
def test_a_verdict_of_other_conditions_does_not_count(cache, name):
    proven.write_verdict('bb', 80, 'A GPU', True)
    (verdict,) = json.loads(cache.read_text())
    cache.write_text(json.dumps([dict(verdict, **{name: 'other'})]))
    assert proven.reasons('bb') == {}


@pytest.mark.parametrize('text', ['', '{', '[1, "a"]', '{"a": 1}', '[{"kernels": "bb"}]'])
def test_a_broken_cache_is_not_believed(cache, text):
    cache.parent.mkdir(parents=True)
    cache.write_text(text)
    assert proven.reasons('bb') == {}
    proven.write_verdict('bb', 80, 'A GPU', True)
    assert proven.reasons('bb')[80][0]


def test_every_proof_is_written_down(monkeypatch):
    """An entry of the table names kernels that a committed result names, too."""
    monkeypatch.undo()
    for proof in proven.PROVEN:
        text = (ROOT / 'benchmarks' / 'results' / proof.result).read_text()
        assert re.fullmatch('[0-9a-f]{16}', proof.kernels) and proof.kernels in text


@pytest.fixture
def kernel_hash(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / 'dev' / 'cuda'))
    return importlib.import_module('check_ptxas').kernel_hash


def test_the_tables_are_of_these_kernels(kernel_hash):
    """Instructions in compiled.md, from which times are predicted: anew after each change."""
    assert f'`{kernel_hash()}`' in (ROOT / 'csrc' / 'cuda' / 'compiled.md').read_text(), (
        'dev/cuda/check_ptxas.py --write csrc/cuda/compiled.md')


@pytest.mark.parametrize('changed, counts, counts_in_all', [
    ('cuda/window/dcnv4_window_forward.cuh', True, True), ('window_plan.cpp', True, True),
    ('cuda/sampling.cuh', True, True), ('bilinear.h', True, True), ('launch_plan.h', True, True),
    ('launch_plan.cpp', False, True), ('cuda/dcnv4_backward.cuh', False, True),
    ('cuda/dcnv4_forward_f32.cu', False, True), ('cuda/dcnv4_cuda.cu', False, False),
    ('cuda/binding.h', False, False), ('cuda/attention/attention_forward.cuh', False, False),
    ('ms_deform_attn_check.cpp', False, False)])
def test_the_hash_names_the_kernels_on_tensor_cores(kernel_hash, tmp_path, changed, counts,
                                                    counts_in_all):
    """They stay proven whatever becomes of direct kernels, bindings and attention."""
    shutil.copytree(ROOT / 'csrc', tmp_path / 'csrc')

    def hashes(root=tmp_path):
        return [kernel_hash(root, of_all) for of_all in (False, True)]
    before = hashes()
    assert before == hashes(ROOT)
    with (tmp_path / 'csrc' / changed).open('a') as file:
        file.write('\n// a comment\n')
    assert hashes() == before
    with (tmp_path / 'csrc' / changed).open('a') as file:
        file.write('int added;\n')
    assert [one != other for one, other in zip(hashes(), before)] == [counts, counts_in_all]
