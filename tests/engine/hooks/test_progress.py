# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The progress bar: shown on a terminal, absent elsewhere, and it leaves things as they were."""

from __future__ import annotations

import io
import logging
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip('mmengine', reason='mmengine is not installed')

from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS

from mmdcnv4.cli.explain import explain
from mmdcnv4.engine.hooks import progress
from mmdcnv4.engine.hooks.progress import ProgressBarHook
from mmdcnv4.errors import UserError

HIDE_CURSOR, SHOW_CURSOR = '\x1b[?25l', '\x1b[?25h'


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def runner() -> SimpleNamespace:
    """What the hook reads of a Runner."""
    logger = logging.Logger('test')
    logger.addHandler(logging.StreamHandler(sys.stdout))
    history = HistoryBuffer()
    history.update(1.25)
    rate = HistoryBuffer()
    rate.update(2e-4)
    return SimpleNamespace(
        logger=logger, iter=0, max_iters=4, train_dataloader=[0] * 4, val_dataloader=[0] * 2,
        test_dataloader=[0] * 2,
        message_hub=SimpleNamespace(log_scalars={'train/loss': history, 'train/lr': rate}))


def run_training(runner: SimpleNamespace) -> None:
    hook = HOOKS.build(dict(type='ProgressBarHook', refresh_per_second=100))
    hook.before_train(runner)
    for index in range(4):
        runner.iter = index
        hook.after_train_iter(runner, index)
        runner.logger.warning('Epoch(train) [1][%d/4]  lr: 1  eta: 0:00:01  loss: 1', index)
    hook.before_val_epoch(runner)
    for index in range(2):
        hook.after_val_iter(runner, index)
    runner.logger.warning('Epoch(val) [1][2/2]    coco/bbox_mAP: 0.5')
    hook.after_val_epoch(runner)
    hook.after_train(runner)
    hook.after_run(runner)


def test_bar_on_a_terminal(runner: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('rich', reason='rich is not installed')
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stdout', terminal)
    monkeypatch.setenv('COLUMNS', '80')
    monkeypatch.setenv('TERM', 'xterm')
    handler = runner.logger.handlers[0]
    handler.setStream(terminal)
    run_training(runner)
    text = terminal.getvalue()
    assert 'train' in text and 'val' in text and '4/4' in text and 'left' in text
    assert 'loss 1.250' in text and 'lr 0.0002' in text
    assert 'coco/bbox_mAP: 0.5' in text, 'results stay'
    assert 'eta:' not in text, 'the bar replaces the lines of single iterations'
    assert handler.stream is terminal and not handler.filters
    assert sys.stdout is terminal


@pytest.mark.parametrize('reason', ['no terminal', 'no rich', 'another rank',
                                    'write and flush only', 'no stdout'])
def test_plain_lines_elsewhere(reason: str, runner: SimpleNamespace,
                               monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO() if reason == 'no terminal' else Terminal()
    put = {'write and flush only': SimpleNamespace(write=stream.write, flush=stream.flush),
           'no stdout': None}  # of an IDE or a log of the user's, of pythonw
    monkeypatch.setattr(sys, 'stdout', put.get(reason, stream))
    if reason == 'no rich':
        monkeypatch.setitem(sys.modules, 'rich.progress', None)
    elif reason == 'another rank':
        monkeypatch.setattr(progress, 'is_main_process', lambda: False)
    runner.logger.handlers[0].setStream(stream)
    run_training(runner)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5 and sum('eta:' in line for line in lines) == 4


def test_bar_of_a_test_alone(runner: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('rich', reason='rich is not installed')
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stdout', terminal)
    monkeypatch.setenv('TERM', 'xterm')
    hook = ProgressBarHook()
    hook.before_test_epoch(runner)
    for index in range(2):
        hook.after_test_iter(runner, index)
    hook.after_test_epoch(runner)
    assert '2/2' in terminal.getvalue() and sys.stdout is terminal


def test_an_error_closes_the_bar(runner: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip('rich', reason='rich is not installed')
    terminal = Terminal()
    monkeypatch.setattr(sys, 'stdout', terminal)
    monkeypatch.setenv('TERM', 'xterm')
    for error in (UserError, KeyboardInterrupt, ZeroDivisionError):
        with pytest.raises(BaseException, match=r'^(error: )?x$'), explain():
            ProgressBarHook().before_train(runner)
            raise error('x')
        text = terminal.getvalue()
        assert text.rfind(SHOW_CURSOR) > text.rfind(HIDE_CURSOR) >= 0
        assert not runner.logger.handlers[0].filters


@pytest.mark.parametrize(('line', 'is_shown'), [
    ('Epoch(train) [1][ 10/100]  lr: 1e-4  eta: 0:01:02  loss: 1', False),
    ('Iter(train) [ 10/100]  lr: 1e-4  eta: 0:01:02  loss: 1', False),
    ('Epoch(val) [1][10/50]    eta: 0:00:09  time: 0.1', False),
    ('Exp name: some_model_20250101', False),
    ('Epoch(val) [1][50/50]    coco/bbox_mAP: 0.4130  time: 0.1', True),
    ('Saving checkpoint at 1 epochs', True),
])
def test_which_lines_the_bar_replaces(line: str, is_shown: bool) -> None:
    record = logging.LogRecord('a', logging.INFO, 'file', 1, line, None, None)
    assert progress._is_not_plain_progress(record) == is_shown
