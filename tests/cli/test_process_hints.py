# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the tools say when another process dies."""

from __future__ import annotations

import os
import signal
import traceback

import pytest
import torch
import torch.distributed as dist

pytest.importorskip('mmengine', reason='mmengine is not installed')

from mmdcnv4.cli import explain


class Suicidal(torch.utils.data.Dataset):
    """Whose worker is killed by the third sample."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        if index == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_killed_worker():
    with pytest.raises((RuntimeError, OSError, EOFError)) as caught, explain.explain():
        list(torch.utils.data.DataLoader(Suicidal(), num_workers=1))
    text = ''.join(traceback.format_exception(caught.value))
    assert 'hint: a worker of the data loader ended or hangs' in text


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
