# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints, resume, distributed set-up and the arguments of the tools."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('mmengine', reason='mmengine is not installed')

from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.registry import MODELS
from torch import distributed as dist

from mmdcnv4.cli import checkpoints, config, distributed, explain, preflight
from mmdcnv4.cli.arguments import add_config_arguments
from mmdcnv4.errors import (
    InvalidType,
    InvalidValue,
    MissingFile,
    MissingKey,
    UserError,
    user_errors,
)
from mmdcnv4.ops.contract import make_geometry

WEIGHTS_ONLY = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6)


# ---------------------------------------------------------------------------------- checkpoints


def stored_by_mmengine() -> dict:
    """What a checkpoint of MMEngine holds beside weights, by type."""
    history = HistoryBuffer()
    for value in (1.5, 2.5):
        history.update(value)
    return dict(
        message_hub=dict(log_scalars={'train/loss': history},
                         runtime_info=dict(epoch=1, best_score=np.float64(0.5),
                                           iters=np.int64(7), flag=np.bool_(True)),
                         resumed_keys={'train/loss': True}),
        meta=dict(dataset_meta=dict(classes=('a', 'b'), palette=[(1, 2, 3)],
                                    colors=np.arange(6, dtype=np.uint8).reshape(2, 3),
                                    anchors=np.array([0.5, 1.0], dtype=np.float32))),
        state_dict=dict(weight=torch.ones(2)))


def test_what_mmengine_stores_loads_weights_only(tmp_path: Path) -> None:
    checkpoints.allow_mmengine_checkpoints()
    torch.save(stored_by_mmengine(), tmp_path / 'a.pth')
    loaded = torch.load(tmp_path / 'a.pth', weights_only=True) if WEIGHTS_ONLY else \
        torch.load(tmp_path / 'a.pth', weights_only=False)
    history = loaded['message_hub']['log_scalars']['train/loss']
    assert isinstance(history, HistoryBuffer) and history.mean() == 2.0
    info, meta = loaded['message_hub']['runtime_info'], loaded['meta']['dataset_meta']
    assert (info['best_score'], info['iters'], info['flag']) == (0.5, 7, True)
    np.testing.assert_array_equal(meta['colors'], [[0, 1, 2], [3, 4, 5]])
    assert meta['anchors'].dtype == np.float32


class Marker:
    """Stands for code that a checkpoint must not run."""

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)

    def __init__(self, path: str) -> None:
        self.path = path


class AttributeOf:
    """Stands for the usual way out of an allow-list that has `getattr`."""

    def __reduce__(self) -> tuple:
        return getattr, (self.owner, self.name)

    def __init__(self, owner: object, name: str) -> None:
        self.owner, self.name = owner, name


@pytest.mark.skipif(not WEIGHTS_ONLY, reason='torch.load is not weights-only before torch 2.6')
def test_nothing_else_loads(tmp_path: Path) -> None:
    checkpoints.allow_mmengine_checkpoints()
    trace = tmp_path / 'was_run'
    for content in (Marker(str(trace)), argparse.Namespace(a=1), np.random.default_rng(0),
                    np.array([None], dtype=object), AttributeOf(HistoryBuffer.mean, '__globals__'),
                    AttributeOf(HistoryBuffer, '__init__'), AttributeOf(np.ndarray, 'mean')):
        torch.save(dict(state_dict={}, extra=content), tmp_path / 'b.pth')
        with pytest.raises(pickle.UnpicklingError, match='Weights only load failed|refused'):
            torch.load(tmp_path / 'b.pth', weights_only=True)
    assert not trace.exists()


def write_checkpoint(file: Path, whole: bool = True) -> str:
    torch.save({'weight': torch.zeros(1000)}, file)
    if not whole:
        content = file.read_bytes()
        file.write_bytes(content[:len(content) // 2])
    return str(file)


def test_resume_finds_the_newest_whole_checkpoint(tmp_path: Path) -> None:
    assert checkpoints.find_resumable_checkpoint(str(tmp_path)) is None
    assert checkpoints.find_resumable_checkpoint(str(tmp_path / 'absent')) is None
    named = write_checkpoint(tmp_path / 'epoch_2.pth')
    newer = write_checkpoint(tmp_path / 'epoch_10.pth')
    write_checkpoint(tmp_path / 'best_coco_bbox_mAP_epoch_99.pth')
    (tmp_path / 'last_checkpoint').write_text(named)
    assert checkpoints.find_resumable_checkpoint(str(tmp_path)) == named
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_7.pth'))  # was deleted
    assert checkpoints.find_resumable_checkpoint(str(tmp_path)) == newer
    write_checkpoint(tmp_path / 'epoch_11.pth', whole=False)  # killed while it was written
    assert checkpoints.find_resumable_checkpoint(str(tmp_path)) == newer


# ------------------------------------------------------------------------------------ arguments


def base_config(**entries: object) -> Config:
    return Config(dict(model=dict(type='M'), launcher='none', default_scope='mmdet', **entries))


def arguments(config: str, **values: object) -> argparse.Namespace:
    defaults = dict(config=config, work_dir=None, cfg_options=None, launcher='none', local_rank=0)
    return argparse.Namespace(**{**defaults, **values})


def test_work_dir_comes_from_command_config_name(tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('LOCAL_RANK', '0')
    file = tmp_path / 'some_model.py'
    file.write_text("model = dict(type='M', depth=1)")
    assert config.load_config(arguments(str(file))).work_dir == 'work_dirs/some_model'
    file.write_text("model = dict(type='M', depth=1)\nwork_dir = 'there'")
    assert config.load_config(arguments(str(file))).work_dir == 'there'
    cfg = config.load_config(arguments(str(file), work_dir='here', launcher='pytorch',
                                        cfg_options={'model.depth': 2}))
    assert (cfg.work_dir, cfg.launcher, cfg.model.depth) == ('here', 'pytorch', 2)


@pytest.mark.parametrize(('text', 'message'), [
    (None, 'does not exist'),
    ('model = dict(', 'cannot read the config .*SyntaxError'),
    ("_base_ = 'absent.py'", 'cannot read the config .*absent.py'),
    ('lr = 1', 'defines no model'),
    ("custom_imports = dict(imports=['no_such_package'])\nmodel = dict(type='M')",
     'cannot read the config .*no_such_package'),
    ('a = b', 'cannot read the config .*NameError'),
    ("_base_ = 'mmdet3::a/b.py'", 'cannot read the config .*AssertionError: .*mmdet3'),
    ("_base_ = 'a.yaml'", 'cannot read the config .*Error'),
])
def test_a_bad_config_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str,
                               message: str) -> None:
    monkeypatch.setenv('LOCAL_RANK', '0')
    file = tmp_path / 'a.py'
    (tmp_path / 'a.yaml').write_text('a: [')
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        config.load_config(arguments(str(file)))
    assert str(file) in str(caught.value)


def test_an_option_without_a_value_is_named(capsys: pytest.CaptureFixture) -> None:
    parser = argparse.ArgumentParser()
    add_config_arguments(parser)
    options = parser.parse_args(['--cfg-options', 'a.b=1', 'c=x=y']).cfg_options
    assert options == {'a.b': 1, 'c': 'x=y'}
    with pytest.raises(SystemExit):
        parser.parse_args(['--cfg-options', 'a=1', 'foo'])
    assert "argument --cfg-options: must be KEY=VALUE, got 'foo'" in capsys.readouterr().err
    for value in ("{'type':(1,2)}", '[1,2', '((1,2)'):
        with pytest.raises(SystemExit):
            parser.parse_args(['--cfg-options', f'a={value}'])
        err = capsys.readouterr().err
        assert 'a dict is set entry by entry, KEY.ENTRY=VALUE; got' in err and value in err


def test_amp(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = base_config(optim_wrapper=dict(type='OptimWrapper'))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(UserError, match='--amp needs a GPU'):
        config.apply_amp(cfg)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    config.apply_amp(cfg)
    assert cfg.optim_wrapper == dict(type='AmpOptimWrapper', loss_scale='dynamic')
    typed = base_config(optim_wrapper=dict(type='OptimWrapper', dtype='bfloat16'))
    config.apply_amp(typed)
    assert typed.optim_wrapper.dtype == 'bfloat16' and 'dtype' not in cfg.optim_wrapper
    config.apply_amp(cfg)  # a config that has it already stays as it is
    assert cfg.optim_wrapper == dict(type='AmpOptimWrapper', loss_scale='dynamic')
    with pytest.raises(UserError, match='got ApexOptimWrapper'):
        config.apply_amp(base_config(optim_wrapper=dict(type='ApexOptimWrapper')))


def test_auto_scale_lr() -> None:
    cfg = base_config(auto_scale_lr=dict(enable=False, base_batch_size=16))
    config.apply_auto_scale_lr(cfg)
    assert cfg.auto_scale_lr.enable is True
    for entries in ({}, dict(auto_scale_lr=dict(enable=False))):
        with pytest.raises(UserError, match='base_batch_size'):
            config.apply_auto_scale_lr(base_config(**entries))


def test_resume_argument(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = base_config(work_dir=str(tmp_path))
    config.apply_resume(cfg, None)
    config.apply_resume(cfg, 'auto')  # nothing there yet
    assert 'resume' not in cfg and 'load_from' not in cfg
    file = write_checkpoint(tmp_path / 'iter_5.pth')
    config.apply_resume(cfg, 'auto')
    assert (cfg.resume, cfg.load_from) == (True, file)
    monkeypatch.setenv('HOME', str(tmp_path))
    config.apply_resume(cfg, '~/iter_5.pth')
    assert (cfg.resume, cfg.load_from) == (True, '~/iter_5.pth')  # MMEngine expands it, too
    with pytest.raises(UserError, match='--resume: the checkpoint absent.pth does not exist'):
        config.apply_resume(cfg, 'absent.pth')


@pytest.mark.parametrize(('scope', 'expected'), [
    ('mmdet', dict(draw=True, interval=1, test_out_dir='...')),
    ('mmdet3d', dict(draw=True, interval=1, test_out_dir='...')),
    ('mmpretrain', dict(enable=True, interval=1, out_dir='...')),
    ('mmseg', dict(draw=True, interval=1)),
])
def test_show_dir_of_each_library(tmp_path: Path, scope: str, expected: dict) -> None:
    folder = str(tmp_path / 'pictures')
    expected = {key: folder if value == '...' else value for key, value in expected.items()}
    cfg = base_config(default_hooks=dict(visualization=dict(type='V')), visualizer=dict(type='W'))
    cfg.default_scope = scope
    config.apply_show(cfg, False, folder, 0)
    assert cfg.default_hooks.visualization == dict(type='V', **expected)
    assert cfg.visualizer.get('save_dir') == (folder if scope == 'mmseg' else None)
    with pytest.raises(UserError, match='visualization hook'):
        config.apply_show(base_config(), False, folder, 0)
    cfg.model.type = 'TwoStageBEVFormerV2'
    with pytest.raises(UserError, match='--show-dir.* TwoStageBEVFormerV2 .*bev_demo.py'):
        config.apply_show(cfg, False, folder, 0)


def test_tta() -> None:
    pipeline = [dict(type='TestTimeAug')]
    cfg = base_config(tta_model=dict(type='T'), tta_pipeline=pipeline,
                      test_dataloader=dict(dataset=dict(type='Wrap', dataset=dict(type='D'))))
    config.apply_tta(cfg)
    assert cfg.model == ConfigDict(type='T', module=dict(type='M'))
    assert cfg.test_dataloader.dataset.dataset.pipeline == pipeline
    with pytest.raises(UserError, match='tta_model and tta_pipeline'):
        config.apply_tta(base_config())


def test_dump_metric() -> None:
    cfg = base_config()
    assert config.dump_metric(cfg, 'a.pkl')['type'] == 'mmdet.DumpDetResults'
    cfg.default_scope = 'mmseg'
    assert config.dump_metric(cfg, 'a.pkl')['type'] == 'DumpResults'
    with pytest.raises(UserError, match='must end in .pkl'):
        config.dump_metric(cfg, 'a.json')


# ---------------------------------------------------------------------------------- distributed


def test_without_a_launcher_nothing_is_distributed() -> None:
    cfg = base_config()
    distributed.prepare_distributed(cfg)
    assert 'model_wrapper_cfg' not in cfg and not dist.is_initialized()


@pytest.mark.parametrize('launcher', ['pytorch', 'slurm', 'mpi'])
def test_gloo_with_the_environment_of_each_launcher(launcher: str,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for name in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('MASTER_ADDR', '')  # means not set
    monkeypatch.setenv('LOCAL_RANK', '')
    assert distributed._local_rank('pytorch') == 0
    variables = {
        'pytorch': dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR='127.0.0.1'),
        'slurm': dict(SLURM_PROCID=0, SLURM_NTASKS=1, SLURM_LOCALID=0, SLURM_NODELIST='here'),
        'mpi': dict(OMPI_COMM_WORLD_RANK=0, OMPI_COMM_WORLD_SIZE=1, OMPI_COMM_WORLD_LOCAL_RANK=0),
    }[launcher]
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv('MASTER_PORT', '0')  # the system chooses
    monkeypatch.setattr(distributed, '_first_slurm_host', lambda: '127.0.0.1')
    cfg = base_config(find_unused_parameters=True)
    cfg.launcher = launcher
    cfg.model = ConfigDict(type='M', neck=dict(norm_cfg=dict(type='SyncBN', eps=1e-3)))
    before = dict(os.environ)
    try:
        distributed.prepare_distributed(cfg)
        assert dist.get_backend() == 'gloo' and dist.get_world_size() == 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)
    assert cfg.model_wrapper_cfg == dict(
        type='MMDistributedDataParallel', broadcast_buffers=False, find_unused_parameters=True,
        device_ids=None)
    assert cfg.model.neck.norm_cfg == dict(type='BN', eps=1e-3)


def test_a_launcher_without_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    for name in ('RANK', 'WORLD_SIZE', 'SLURM_PROCID'):
        monkeypatch.delenv(name, raising=False)
    cfg = base_config()
    for launcher, variable in (('pytorch', 'RANK'), ('slurm', 'SLURM_PROCID')):
        cfg.launcher = launcher
        with pytest.raises(UserError, match=f'--launcher {launcher} needs .*{variable}'):
            distributed.prepare_distributed(cfg)


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setenv('LOCAL_RANK', '1')
    cfg = base_config()
    cfg.launcher = 'pytorch'
    with pytest.raises(UserError, match=r'has 1 GPU\(s\), and more processes'):
        distributed.prepare_distributed(cfg)


# ------------------------------------------------------------------------------------ preflight


@pytest.mark.parametrize(('imports', 'backbone', 'hint'), [
    (None, 'FlashInternImage', True),
    (['mmdet.something'], 'FlashInternImage', True),
    (['mmdcnv4'], 'FlashInternImage', False),
    (['mmdcnv4.registration'], 'FlashInternImage', False),
    (None, 'ResNet', False),
])
def test_missing_import_is_noticed(imports: list, backbone: str, hint: bool) -> None:
    cfg = base_config(custom_imports=None if imports is None else dict(imports=imports))
    cfg.model.backbone = dict(type=backbone, dcn=[dict(type='other')])
    message = preflight.missing_import(cfg)
    assert (message is not None) == hint
    if hint:
        assert "custom_imports = dict(imports=['mmdcnv4']" in message and backbone in message


# ------------------------------------------------------------------------------------------ ends


class Wrapped(Exception):
    """What a library makes of an error."""


def fail_with(error: BaseException, cause: BaseException) -> None:
    try:
        raise cause
    except type(cause):
        raise error  # noqa: B904  as libraries do


def test_a_user_error_ends_in_one_line_also_behind_a_registry() -> None:
    with pytest.raises(SystemExit, match='^error: x$'), explain.explain():
        raise UserError('x')
    with pytest.raises(UserError, match='^x$'), explain.explain(debug=True):
        raise UserError('x')
    with pytest.raises(SystemExit, match='^error: x$'), explain.explain():
        fail_with(InvalidValue('class `A` in a.py: x'), InvalidValue('x'))
    worker = InvalidValue('Caught InvalidValue in DataLoader worker process 0.\nOriginal Traceback '
                          '(most recent call last):\n ...\nmmdcnv4.errors.InvalidValue: x: y')
    with pytest.raises(SystemExit, match='^error: x: y$'), explain.explain():
        raise worker


def test_a_bug_keeps_its_type_and_its_traceback() -> None:
    """Also one that came while a user error was handled, and one that says what data do."""
    for bug in (ZeroDivisionError('x'), AttributeError("'NoneType' object has no attribute 'a'"),
                RuntimeError('expected scalar type Float but found Half')):
        with pytest.raises(type(bug)) as caught, explain.explain(base_config()):
            raise bug
        assert caught.value is bug and not getattr(bug, '__notes__', [])
    with pytest.raises(ZeroDivisionError), explain.explain(base_config()):
        fail_with(ZeroDivisionError('x'), UserError('y'))


def test_hints_rest_on_types(tmp_path: Path) -> None:
    cfg = base_config(train_dataloader=dict(dataset=dict(data_root=f'{tmp_path}/')))
    for bug, expected in (
            (FileNotFoundError(2, 'No such file', f'{tmp_path}/a.jpg'),
             f'{tmp_path}/a.jpg does not exist .*train_dataloader.dataset.data_root'),
            (FileNotFoundError(2, 'No such file', '/elsewhere/a'), r'/elsewhere/a does .*\)$'),
            (OSError(28, 'No space left on device'), 'the disk is full.*--resume'),
            (ModuleNotFoundError('x', name='mmdet3d.models'), 'mmdet3d is not installed'),
            (FileNotFoundError('only a text'), None), (OSError(5, 'I/O'), None),
            (ModuleNotFoundError('x', name='mmdetx'), None), (KeyError('images'), None),
            (RuntimeError('No space left on device'), None)):
        for error in (bug, Wrapped('b')):
            with pytest.raises(type(error)) as caught, explain.explain(cfg):
                fail_with(error, bug) if error is not bug else fail_with(bug, ValueError('c'))
            notes = getattr(caught.value, '__notes__', [])
            if expected is None:
                assert not notes
            else:
                assert len(notes) == 1 and re.match(f'hint: .*{expected}', notes[0]), notes
            if notes:
                del caught.value.__notes__


def test_a_type_that_was_not_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> list:
        with pytest.raises(KeyError, match='FlashInternImag is not in') as caught, \
                explain.explain(base_config()):
            MODELS.build(dict(type='FlashInternImag'))
        return getattr(caught.value, '__notes__', [])

    monkeypatch.setattr(explain.registration, 'skipped', {})
    assert build() == []
    monkeypatch.setattr(explain.registration, 'skipped', {'mmdcnv4.models': 'needs mmcv'})
    assert build() == ['hint: mmdcnv4 did not register all of its classes: mmdcnv4.models: needs '
                       'mmcv']


def test_tracebacks_are_in_the_log_of_the_run_and_in_no_other(tmp_path: Path) -> None:
    for name in ('one', 'two'):
        (tmp_path / name).mkdir()
        MMLogger.get_instance(f'{tmp_path}-{name}', log_file=str(tmp_path / name / 'a.log'))
    for error, kind in ((UserError('mistake'), SystemExit), (ZeroDivisionError('bug'),
                                                             ZeroDivisionError)):
        with pytest.raises(kind), explain.explain(base_config(work_dir=str(tmp_path / 'one'))):
            raise error
    log = (tmp_path / 'one/a.log').read_text()
    assert log.count('Traceback') == 2 and 'UserError: mistake' in log
    assert 'ZeroDivisionError: bug' in log and 'test_cli.py' in log
    assert not (tmp_path / 'two/a.log').read_text()


def test_user_errors_are_what_programs_catch() -> None:
    @user_errors
    def refuse(error: Exception) -> None:
        raise error

    def fail_elsewhere() -> None:
        json.loads('[')

    for own, plain in ((InvalidType, TypeError), (InvalidValue, ValueError),
                       (MissingFile, FileNotFoundError), (MissingKey, KeyError)):
        assert issubclass(own, plain) and issubclass(own, UserError)
        assert str(own('a b')) == 'a b'
    # raised by a module of another package, and so passed on as they are
    for plain in (TypeError, ValueError, FileNotFoundError, ZeroDivisionError):
        with pytest.raises(plain) as caught:
            refuse(plain('x'))
        assert type(caught.value) is plain
    with pytest.raises(json.JSONDecodeError):
        user_errors(fail_elsewhere)()
    with pytest.raises(InvalidValue, match='kernel_size'):
        user_errors(make_geometry)(kernel_size=-1, groups=1)
