# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Annealing of the temperature, in a run of mmengine."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import HOOKS
from torch import nn

from mmdcnv4.engine import TemperatureAnnealingHook


class Layer(nn.Module):
    """Remembers the temperatures it was given."""

    def __init__(self):
        super().__init__()
        self.temperatures = []

    def set_temperature(self, value):
        self.temperatures.append(value)


def run(hook, model, iterations, length, start=0):
    runner = SimpleNamespace(model=model, train_dataloader=[None] * length, iter=start)
    hook.before_train(runner)
    for runner.iter in range(start, start + iterations):
        hook.before_train_iter(runner, 0)


def test_falls_linearly_and_stays():
    model = nn.Sequential(Layer(), nn.Sequential(Layer()))
    run(HOOKS.build(dict(type='TemperatureAnnealingHook', epochs=2)), model, 12, length=4)
    expected = [1 + 29 * (1 - iteration / 8) for iteration in range(9)]
    for layer in (model[0], model[1][0]):
        assert layer.temperatures == pytest.approx(expected)  # one call when nothing changes


def test_a_resumed_run_goes_on():
    layer = Layer()
    run(TemperatureAnnealingHook(epochs=2), nn.Sequential(layer), 2, length=4, start=6)
    assert layer.temperatures == pytest.approx([1 + 29 / 4, 1 + 29 / 8])
    run(TemperatureAnnealingHook(epochs=2), nn.Sequential(layer), 2, length=4, start=100)
    assert layer.temperatures[2:] == [1.0]


def test_refusals():
    with pytest.raises(ValueError, match='epochs must be a number > 0, got 0'):
        TemperatureAnnealingHook(epochs=0)
    with pytest.raises(ValueError, match='a module with set_temperature, got Linear'):
        run(TemperatureAnnealingHook(), torch.nn.Linear(1, 1), 1, 1)
