# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A run that is interrupted, whose disk is full, or whose loss is NaN."""

from __future__ import annotations

import errno
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from helpers.tiny_run import config, same_bits
from mmdcnv4.cli.checkpoints import (
    allow_mmengine_checkpoints,
    damage,
    find_resumable_checkpoint,
)
from mmdcnv4.cli.config import apply_resume
from mmdcnv4.cli.runner import build_runner
from mmdcnv4.engine.hooks import checkpoint as checkpoint_hook
from mmdcnv4.errors import InvalidValue, UserError

KEPT = ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers')


class Stop(Exception):
    """Stands for what ends a process."""


class StopHook(Hook):
    """Ends the run before iteration `at`."""

    def __init__(self, at):
        self.at = at

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            raise Stop


def train(cfg, stop_at=None, resume=None):
    apply_resume(cfg, resume)
    runner = build_runner(cfg, ('train',))
    if stop_at is not None:
        runner.register_hook(StopHook(stop_at))
    runner.train()
    return runner


def load(file):
    allow_mmengine_checkpoints()
    return torch.load(file, weights_only=True)


def last(work_dir):
    return load(find_resumable_checkpoint(str(work_dir)))


@pytest.mark.parametrize('options, stop_at', [
    (dict(), 15), (dict(workers=2, seed=None), 15),
    (dict(by_epoch=False, length=12, interval=5, seed=None), 11)], ids=str)
def test_resumed_run_ends_with_the_same_bits(tmp_path, options, stop_at):
    """Two runs without a seed differ, so there the undisturbed run hands its own to the other."""
    whole = train(config(tmp_path, tmp_path / 'whole', **options))
    cut = config(tmp_path, tmp_path / 'cut', **options)
    cut.randomness.seed = whole.seed
    with pytest.raises(Stop):
        train(cut, stop_at)
    again = config(tmp_path, tmp_path / 'cut', **options)
    again.experiment_name = 'again'
    train(again, resume='auto')
    expected, found = last(tmp_path / 'whole'), last(tmp_path / 'cut')
    assert found['meta']['iter'] == expected['meta']['iter'] == whole.max_iters
    for key in KEPT:
        assert same_bits(found[key], expected[key]), key


def test_augmentations_do_not_depend_on_the_number_of_workers(tmp_path):
    for workers in (0, 2):
        train(config(tmp_path, tmp_path / str(workers), workers=workers, length=2))
    states = [last(tmp_path / str(workers))['state_dict'] for workers in (0, 2)]
    assert same_bits(*states)


def test_epochs_and_iterations_draw_different_numbers(tmp_path, monkeypatch):
    keys = []
    from mmdcnv4.engine.hooks import randomness
    original = randomness.seed_by
    monkeypatch.setattr(randomness, 'seed_by', lambda *key: keys.append(key) or original(*key))
    train(config(tmp_path, tmp_path / 'work', length=2))
    assert len(keys) == len(set(keys)) == 2 + 12 + 12  # epochs, iterations, batches


# ---------------------------------------------------------------------------------------- NaN


def test_a_nan_loss_stops_and_names_the_batch(tmp_path):
    cfg = config(tmp_path, tmp_path / 'work')
    cfg.model.nan_at = 14
    with pytest.raises(UserError, match=r'not finite in iteration 14, epoch 3: loss nan, '
                       r'loss_fit nan; learning rate [\d.e-]+; batch: picture-\d+.png, '):
        train(cfg)
    content = last(tmp_path / 'work')
    assert content['meta']['iter'] == 12
    assert all(torch.isfinite(value).all() for value in content['state_dict'].values())


def test_opting_out_of_the_stop_still_keeps_the_checkpoints(tmp_path):
    cfg = config(tmp_path, tmp_path / 'work')
    cfg.model.nan_at = 14
    cfg.custom_hooks.append(dict(type='InvalidLossHook', stop=False))
    with pytest.raises(UserError, match=r'weights are not finite .epoch 3., .*conv'):
        train(cfg)
    assert last(tmp_path / 'work')['meta']['iter'] == 12


# -------------------------------------------------------------------------------- checkpoints


def test_the_older_checkpoint_goes_last(tmp_path, monkeypatch):
    """With one checkpoint to keep, too: at no moment there is none."""
    seen = []
    put = checkpoint_hook.WholeFilesBackend.put

    def observed(self, obj, filepath):
        seen.append(sorted(path.name for path in tmp_path.glob('work/epoch_*.pth')))
        put(self, obj, filepath)

    monkeypatch.setattr(checkpoint_hook.WholeFilesBackend, 'put', observed)
    train(config(tmp_path, tmp_path / 'work', keep=1))
    assert seen == [[], ['epoch_1.pth'], ['epoch_2.pth']]
    assert [path.name for path in tmp_path.glob('work/*.pth')] == ['epoch_3.pth']
    assert not list(tmp_path.glob('work/.*'))


def test_a_full_disk_leaves_what_is_there(tmp_path, monkeypatch):
    calls = []

    def fsync(handle):
        calls.append(handle)
        if len(calls) > 2:  # the first file and its folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint_hook.os, 'fsync', fsync)
    with pytest.raises(UserError, match=r'cannot write the checkpoint .*epoch_2.pth of [\d.]+ MiB: '
                       'No space left on device. The older'):
        train(config(tmp_path, tmp_path / 'work', keep=1))
    assert [path.name for path in tmp_path.glob('work/*.pth')] == ['epoch_1.pth']
    assert damage(tmp_path / 'work/epoch_1.pth') is None and not list(tmp_path.glob('work/.*'))


def test_leftovers_of_a_killed_process_are_taken_away(tmp_path):
    work = tmp_path / 'work'
    work.mkdir()
    (work / '.epoch_7.pth.partial').write_bytes(b'x')
    train(config(tmp_path, work, length=1))
    assert not list(work.glob('.*'))


def harm(file: Path, kind: str) -> None:
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        entry = max(archive.infolist(), key=lambda info: info.file_size)
    if kind == 'zeros':
        start = entry.header_offset + 30 + len(entry.filename) + 200
        content[start:start + entry.file_size // 2] = bytes(entry.file_size // 2)
    elif kind == 'header':
        content[entry.header_offset:entry.header_offset + 20] = b'\xff' * 20
    else:
        del content[len(content) // 2:]
    file.write_bytes(content)


@pytest.mark.parametrize('kind, words', [
    ('zeros', 'check sum'), ('header', 'damaged'), ('half', 'truncated')])
def test_a_damaged_checkpoint_is_passed_over_loudly(tmp_path, capsys, kind, words):
    for number in (1, 2):
        torch.save({'a': torch.randn(400)}, tmp_path / f'epoch_{number}.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_2.pth'))
    assert find_resumable_checkpoint(str(tmp_path)).endswith('epoch_2.pth')
    assert capsys.readouterr().out == ''
    harm(tmp_path / 'epoch_2.pth', kind)
    assert words in damage(tmp_path / 'epoch_2.pth')
    assert find_resumable_checkpoint(str(tmp_path)).endswith('epoch_1.pth')
    text = capsys.readouterr()
    assert 'DAMAGED CHECKPOINT' in text.out + text.err and 'epoch_2.pth' in text.out + text.err
    harm(tmp_path / 'epoch_1.pth', kind)
    assert find_resumable_checkpoint(str(tmp_path)) is None
    text = capsys.readouterr()
    assert 'holds no other checkpoint' in text.out + text.err


def foreign(folder, length, hooks=(), **options):
    """The Runner of a program that knows nothing of this package, as `mim train` builds it."""
    cfg = config(folder, folder / 'work', length=length, seed=1)
    cfg.custom_hooks = [dict(type=name) for name in hooks]
    cfg.update(experiment_name=f'{folder.name}-{length}-{len(hooks)}-{len(options)}', **options)
    return Runner.from_cfg(cfg)


@pytest.fixture
def no_allowed_types():
    """As in a fresh process, in which MMEngine cannot read what it has written."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.add_safe_globals(allowed)


@pytest.mark.parametrize('kind', ['header', 'half'])
def test_the_hook_passes_over_a_damaged_checkpoint(tmp_path, capsys, kind, no_allowed_types):
    foreign(tmp_path, 2).train()
    harm(tmp_path / 'work/epoch_2.pth', kind)
    with pytest.raises((RuntimeError, EOFError, OSError, pickle.UnpicklingError)):
        foreign(tmp_path, 3, resume=True).train()
    runner = foreign(tmp_path, 3, ['RunChecksHook'], resume=True)
    runner.train()
    text = capsys.readouterr()
    assert 'DAMAGED CHECKPOINT' in text.out + text.err
    assert runner._load_from == str(tmp_path / 'work/epoch_1.pth')
    assert runner.epoch == 3 and 'resumed epoch: 1, iter: 6' in text.out + text.err
    for file in tmp_path.glob('work/epoch_*.pth'):
        harm(file, kind)
    runner = foreign(tmp_path, 1, ['RunChecksHook'], resume=True)
    runner.train()
    text = capsys.readouterr()
    assert runner.iter == 6 and 'training starts at the beginning' in text.out + text.err


def test_the_hook_refuses_a_damaged_checkpoint_that_is_named(tmp_path, no_allowed_types):
    file = tmp_path / 'work/epoch_1.pth'
    foreign(tmp_path, 1).train()
    runner = foreign(tmp_path, 2, ['RunChecksHook'], resume=True, load_from=str(file))
    runner.train()
    assert runner.iter == 12
    harm(file, 'half')
    for resume in (True, False):
        runner = foreign(tmp_path, 4 + resume, ['RunChecksHook'], resume=resume,
                         load_from=str(file))
        with pytest.raises(InvalidValue, match='load_from: the checkpoint .*epoch_1.pth cannot be '
                           'used: it is truncated'):
            runner.train()


def test_a_config_that_resumes_by_itself(tmp_path):
    """`resume = True` in the file is `--resume` of the command line."""
    work = tmp_path / 'work'
    work.mkdir()
    for number in (1, 2):
        torch.save({'a': torch.randn(400)}, work / f'epoch_{number}.pth')
    harm(work / 'epoch_2.pth', 'zeros')
    cfg = config(tmp_path, work)
    cfg.resume = True
    apply_resume(cfg, None)
    assert cfg.resume and cfg.load_from == str(work / 'epoch_1.pth')
    harm(work / 'epoch_1.pth', 'zeros')
    cfg.load_from = None
    apply_resume(cfg, None)
    assert not cfg.resume and cfg.load_from is None


def test_what_lies_elsewhere_is_left_to_mmengine(tmp_path):
    (tmp_path / 'parts').mkdir()
    torch.save({'a': torch.ones(4)}, tmp_path / 'epoch_1.pth')
    for name in ('s3://bucket/epoch_2.pth', str(tmp_path / 'parts')):
        (tmp_path / 'last_checkpoint').write_text(name)
        assert find_resumable_checkpoint(str(tmp_path)) == name
