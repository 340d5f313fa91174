# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The small diffusion run: its measures against known values, and a run of a few steps."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from helpers.tool_runner import load_tool

tool = None


@pytest.fixture(autouse=True)
def _tool():
    global tool
    for package in ('diffusers', 'sklearn', 'matplotlib'):
        pytest.importorskip(package)
    tool = load_tool('demo/diffusion_digits')


def test_frechet_distance():
    """Of normal distributions: squared distance of the means, and of the standard deviations."""
    x = np.random.default_rng(0).normal(size=(20000, 3))
    assert tool.frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    assert tool.frechet_distance(x, x + [1, 2, 0]) == pytest.approx(5, abs=1e-6)
    assert tool.frechet_distance(x, 3 * x) == pytest.approx(3 * 4, rel=0.05)


def test_the_judge_knows_the_real_digits():
    images, labels = tool.load_digits()
    assert images.shape == (1797, 1, 16, 16) and images.min() >= -1 and images.max() <= 1
    judge = tool.Judge(images, labels)
    found = judge(images, labels)
    assert found['accuracy'] > 0.98 and found['frechet_distance'] < 1e-3
    noise = judge(torch.randn_like(images), labels)
    assert noise['frechet_distance'] > 1 > judge.between_halves()
    assert noise['accuracy'] < 0.3


def test_a_run(tmp_path):
    result = tool.main(['--work-dir', str(tmp_path), '--steps', '2', '--batch', '4', '--samples',
                        '100', '--sampler-steps', '1'])
    plain, dcnv4 = result['networks'].values()
    assert (plain['parameters'], dcnv4['parameters']) == (252_497, 196_033)
    assert all(len(record['losses']) == 2 for record in (plain, dcnv4))
    assert json.loads((tmp_path / 'result.json').read_text()) == result
    assert {path.name for path in tmp_path.iterdir()} == {
        'result.json', 'losses.png', 'samples.png'}
