# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are not those of the model: refused, named tensor by tensor, or warned of."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip('mmengine', reason='mmengine is not installed')

from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from torch import nn

from mmdcnv4.checks import weights
from mmdcnv4.engine.hooks import RunChecksHook
from mmdcnv4.errors import InvalidValue


def make_model(classes: int = 4, layers: int = 3) -> nn.Module:
    return nn.ModuleDict(dict(
        backbone=nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)), nn.BatchNorm1d(8)),
        head=nn.ModuleDict(dict(cls=nn.Linear(8, classes), reg=nn.Linear(8, 2)))))


def make_config(classes: int = 4, layers: int = 3, **rest: Any) -> Config:
    return Config(dict(model=dict(
        type='Net', frames=(0,), backbone=dict(type='Line', layers=layers, with_cp=True),
        head=dict(type='Head', num_classes=classes, loss_cls=dict(weight=2)), **rest)))


def checkpoint_of(model: nn.Module, config: Config | None = None, **extra: Any) -> dict:
    meta = {} if config is None else dict(meta=dict(cfg=config.pretty_text))
    return dict(state_dict={**model.state_dict(), **extra}, **meta)


def message(model: nn.Module, checkpoint: dict, config: Config) -> str:
    with pytest.raises(InvalidValue) as caught:
        weights.check_match(model, weights.Shapes.of(checkpoint), 'a.pth', config,
                            option='--allow-mismatch')
    assert '--allow-mismatch' in str(caught.value)
    return str(caught.value)


def test_the_same_model_passes() -> None:
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    content = checkpoint_of(make_model(), make_config())
    weights.check_match(model, weights.Shapes.of(content), 'a.pth', make_config())
    content['state_dict'] = {f'module.{name}': value for name, value in
                             content['state_dict'].items() if 'num_batches_tracked' not in name}
    weights.check_match(nn.DataParallel(model), weights.Shapes.of(content), 'a.pth')
    for name, value in model.state_dict().items():  # the look leaves everything as it was
        assert torch.equal(value, before[name])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_other_classes() -> None:
    text = message(make_model(3), checkpoint_of(make_model(), make_config()), make_config(3))
    assert '2 of 15 tensors have another shape' in text
    assert re.search(r'head.cls.weight +\(4, 8\) in the file, \(3, 8\) in the model', text)
    assert 'model.head.num_classes: 4 in the checkpoint, 3 in the config' in text
    assert 'layers' not in text and 'loss' not in text and 'frames' not in text


def test_other_depth_and_entries_of_the_whole_model() -> None:
    """Tensors too many are no less wrong than those too few: numbers of a net cut short."""
    saved = make_config(fusion=None)
    saved.model.frames = (-1, 0)
    text = message(make_model(layers=2), checkpoint_of(make_model(), saved), make_config(layers=2))
    assert 'model.backbone.layers: 3 in the checkpoint, 2 in the config' in text
    assert 'model.frames: [-1, 0] in the checkpoint, [0] in the config' in text
    assert re.search(r'tensors of the file are not in the model: .*backbone\.3\.', text)
    text = message(make_model(), checkpoint_of(make_model(layers=2)), make_config())
    assert 'tensors of the model are not in the file: backbone.' in text
    assert 'entries of the config that may be why:\n  model.' in text  # the file has no config
    assert 'model.backbone.layers=3' in text and 'num_classes' not in text


def test_parts_that_the_model_has_not_are_no_fault() -> None:
    content = checkpoint_of(make_model(), auxiliary=torch.zeros(3))
    content['state_dict']['teacher.weight'] = torch.zeros(2)
    weights.check_match(make_model(), weights.Shapes.of(content), 'a.pth')
    content['state_dict']['head.extra.weight'] = torch.zeros(2)
    assert '1 tensors of the file are not in the model: head.extra.weight' in message(
        make_model(), content, make_config())


class Renamed(nn.Linear):
    """Reads what an older version wrote."""

    def _load_from_state_dict(self, state: dict, prefix: str, metadata: dict, *rest: Any) -> None:
        if metadata.get('version') is None and prefix + 'kernel' in state:
            state[prefix + 'weight'] = state.pop(prefix + 'kernel').reshape(self.weight.shape)
        super()._load_from_state_dict(state, prefix, metadata, *rest)


def test_names_of_older_versions_are_translated() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Renamed(2, 3))
    state = {**model.state_dict(), '1.kernel': torch.zeros(6)}
    del state['1.weight']
    weights.check_match(model, weights.Shapes.of(state), 'a.pth')
    state['1.kernel'] = torch.zeros(3, 2, 1, 1)
    weights.check_match(model, weights.Shapes.of(dict(state_dict=state)), 'a.pth')


def test_the_text_of_a_config_is_read_and_not_run() -> None:
    content = checkpoint_of(make_model())
    for text in ("model = dict(a=__import__('os').system('exit 1'))", 'model = [', 'x = 1', ''):
        content['meta'] = dict(cfg=text)
        assert 'may be why' in message(make_model(3), content, make_config(3))


@pytest.mark.parametrize('resume', [True, False])
@pytest.mark.parametrize('in_training', [True, False])
@pytest.mark.parametrize('allowed', [True, False])
def test_the_hook(resume: bool, in_training: bool, allowed: bool,
                  capsys: pytest.CaptureFixture) -> None:
    """Tested and resumed weights must fit; those that a training starts from are warned of."""
    loop = SimpleNamespace(dataloader=None) if in_training else dict(type='Loop')
    runner = SimpleNamespace(model=make_model(3), cfg=make_config(3), _load_from='a.pth',
                             _resume=resume, _train_loop=loop)
    hook, content = RunChecksHook(allow_mismatch=allowed), checkpoint_of(make_model())
    if not allowed and (resume or not in_training):
        with pytest.raises(InvalidValue, match='a.pth does not fit the model:\n2 of 15') as caught:
            hook.after_load_checkpoint(runner, content)
        # what it advises is a line of a config
        (advised,) = eval(re.search(r'custom_hooks = (\[.*?\])', str(caught.value))[1])
        assert '--' not in str(caught.value)
        HOOKS.build(advised).after_load_checkpoint(runner, content)
        runner._load_from = None
        with pytest.raises(InvalidValue, match='--allow-mismatch'):  # the tools add it so
            RunChecksHook(check_config=False).after_load_checkpoint(runner, content)
        return
    hook.after_load_checkpoint(runner, content)
    printed = capsys.readouterr()
    assert 'does not fit the model in full' in printed.out + printed.err


def resume(saved: list[int], own: list[int], resumes: bool = True) -> None:
    """Loads the state of an optimizer with so many parameters per group into another one."""
    def optimizer(sizes: list[int]) -> torch.optim.Optimizer:
        return torch.optim.SGD([dict(params=[nn.Parameter(torch.ones(1)) for _ in range(size)])
                                for size in sizes], lr=0.1)
    runner = SimpleNamespace(_load_from='a.pth', _resume=resumes, _train_loop=None,
                             optim_wrapper=OptimWrapper(optimizer(own)))
    RunChecksHook(check_config=False).after_load_checkpoint(
        runner, dict(optimizer=optimizer(saved).state_dict()))


@pytest.mark.parametrize(('own', 'words'), [
    ([4], '1 of 4'), ([2, 3], '2 of 5'), ([1, 1, 3], '3 of 5')])
def test_resuming_with_other_groups_of_parameters(own: list[int], words: str) -> None:
    """As another `frozen_stages` leaves them, or another constructor of the optimizer."""
    with pytest.raises(InvalidValue, match='^cannot resume: .* has 2 groups of 5 parameters, that '
                       f'of the config {words}. Another frozen_stages.*load_from=<checkpoint>'):
        resume([3, 2], own)
    resume([3, 2], own, resumes=False)  # reads the weights alone
    resume(own, own)
