# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Compiling a part of a model by a hook: what it computes, what it saves, what it refuses."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import HOOKS
from torch import nn

from mmdcnv4.models.backbones import FlashInternImage

TINY = dict(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), drop_path_rate=0.0)


class Detector(nn.Module):
    """A backbone and what depends on data."""

    def __init__(self, **options):
        super().__init__()
        self.backbone = FlashInternImage(**TINY, **options)
        self.head = nn.Linear(128, 2)

    def forward(self, images):
        scores = self.head(self.backbone(images)[-1].mean((2, 3)))
        return scores[scores[:, 0] > scores[:, 1].mean()]


def count_graphs(**options):
    """A hook whose compiler only counts, and its counts."""
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    return HOOKS.build(dict(type='CompileHook', backend=backend, **options)), sizes


@pytest.mark.parametrize('options', [{}, dict(with_cp=True)], ids=['plain', 'with_cp'])
def test_training_as_without(options):
    """One graph, the same losses and gradients, the names of the state as before."""
    torch.manual_seed(0)
    model = Detector(**options)
    plain, names = copy.deepcopy(model), list(model.state_dict())
    hook, graphs = count_graphs()
    hook.before_run(SimpleNamespace(model=model))
    images = torch.randn(2, 3, 64, 96)
    for one in (plain, model):
        one.train()
        one(images).square().sum().backward()
    assert len(graphs) == 1 and list(model.state_dict()) == names
    for (name, a), b in zip(plain.named_parameters(), model.parameters()):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5, msg=name)
    assert list(copy.deepcopy(model).state_dict()) == names  # as EMAHook does


def test_sizes_of_images():
    """A third size needs no new graph: PyTorch has made them variable by then."""
    model = Detector().eval()
    hook, graphs = count_graphs()
    hook.before_run(SimpleNamespace(model=model))
    with torch.no_grad():
        for height, width in ((64, 96), (96, 128), (128, 160), (160, 128)):
            images = torch.randn(1, 3, height, width)
            torch.testing.assert_close(model.backbone(images), model.backbone.forward(images))
    assert len(graphs) == 2


def test_parts_of_a_wrapped_model(monkeypatch):
    """Dotted names, through a wrapper; all are checked before any is compiled."""
    model, compiled = Detector(), []
    monkeypatch.setattr(nn.Module, 'compile',
                        lambda self, **options: compiled.append((type(self).__name__, options)))
    wrapped = MMDistributedDataParallel.__new__(MMDistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = model
    hook = HOOKS.build(dict(type='CompileHook', modules=['head', 'backbone.levels.0'],
                            mode='reduce-overhead'))
    hook.before_run(SimpleNamespace(model=wrapped))
    assert compiled == [('Linear', dict(mode='reduce-overhead')),
                        (type(model.backbone.levels[0]).__name__, dict(mode='reduce-overhead'))]
    for name in ('neck', '', 'backbone.neck'):
        hook = HOOKS.build(dict(type='CompileHook', modules=('head', name)))
        with pytest.raises(ValueError, match=r'must name parts of Detector \(backbone, head, or '
                                             rf"parts of them\), got '{name}'"):
            hook.before_run(SimpleNamespace(model=wrapped))
    assert len(compiled) == 2
