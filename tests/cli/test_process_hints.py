# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the tools say when another process dies."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch.distributed as dist

pytest.importorskip('mmengine', reason='mmengine is not installed')

from helpers.tool_runner import environment
from mmdcnv4.cli import explain

_KILLED_WORKER = """
import os, signal, subprocess, sys, torch
from mmdcnv4.cli.explain import explain

class Suicidal(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return index

def show(*error):
    subprocess.run('true')  # its end calls the handler for the end of a child, which may raise
    sys.__excepthook__(*error)

sys.excepthook = show
with explain():
    list(torch.utils.data.DataLoader(Suicidal(), num_workers=1))
"""


def test_a_killed_worker():
    """In a process of its own: torch's signal handler goes on raising where it is."""
    done = subprocess.run([sys.executable, '-c', _KILLED_WORKER], text=True, capture_output=True,
                          env=environment(), timeout=120)
    assert done.returncode == 1
    assert 'hint: a worker of the data loader ended or hangs' in done.stderr
    assert 'Error in sys.excepthook' not in done.stderr


def test_a_worker_dies_while_the_context_is_left(capsys):
    """Then the context never hears of the error, and Python shows it as it is."""
    show = sys.excepthook
    context = explain.explain()
    context.__enter__()
    scope = {'__name__': 'torch.utils.data._utils.signal_handling'}
    exec('def handler():\n    raise RuntimeError("killed")', scope)
    try:
        scope['handler']()
    except RuntimeError as error:
        sys.excepthook(type(error), error, error.__traceback__)
    text = capsys.readouterr().err
    assert 'RuntimeError: killed\nhint: a worker of the data loader ended or hangs' in text
    context.__exit__(None, None, None)
    assert sys.excepthook is show


@pytest.mark.parametrize('error', [None, ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_the_hook_is_put_back(error):
    show = sys.excepthook
    with contextlib.suppress(ZeroDivisionError, KeyboardInterrupt, SystemExit), explain.explain():
        assert sys.excepthook is not show
        if error is not None:
            raise error
    assert sys.excepthook is show


def test_another_process_of_the_run(monkeypatch):
    monkeypatch.setattr(dist, 'is_initialized', lambda: True)
    monkeypatch.setattr(dist, 'get_world_size', lambda: 2)
    monkeypatch.setattr(dist, 'get_rank', lambda: 1)

    def fail(place):
        scope = {'__name__': place}
        exec('def lost():\n    raise RuntimeError("recv")', scope)
        try:
            scope['lost']()
        except RuntimeError as error:
            return explain.hint(error)

    assert 'this is process 1 of 2' in fail('torch.distributed.distributed_c10d')
    assert fail('mmdet.models') is None
    monkeypatch.setattr(dist, 'get_world_size', lambda: 1)
    assert fail('torch.distributed.distributed_c10d') is None
