# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A warm-up with accumulated gradients; when maps of past frames are kept in a test."""

from __future__ import annotations

import pytest

pytest.importorskip('mmengine', reason='mmengine is not installed')

from mmengine.config import Config

from mmdcnv4.cli.config import apply_map_cache
from mmdcnv4.cli.schedule import apply_accumulation


def make_config(count: int = 2) -> Config:
    return Config(dict(
        optim_wrapper=dict(type='OptimWrapper', accumulative_counts=count),
        param_scheduler=[
            dict(type='LinearLR', by_epoch=False, begin=0, end=2000),
            dict(type='CosineAnnealingLR', by_epoch=False, begin=2000, end=9000),
            dict(type='LinearLR', by_epoch=False, begin=8000, end=9000),
            dict(type='MultiStepLR', by_epoch=True, begin=0, end=24, milestones=[20])]))


def test_a_warm_up_is_counted_in_updates(capsys: pytest.CaptureFixture) -> None:
    cfg = make_config()
    apply_accumulation(cfg, scale_warm_up=False)
    assert cfg.param_scheduler == make_config().param_scheduler
    text = ' '.join(''.join(capsys.readouterr()).split())
    assert 'param_scheduler.0 counts iterations, and its 2000 are 1000 updates' in text
    assert '--scale-warm-up, which makes them 4000' in text and 'scheduler.2' not in text


def test_it_is_scaled_where_asked_for(capsys: pytest.CaptureFixture) -> None:
    cfg = make_config(4)
    apply_accumulation(cfg, scale_warm_up=True)
    assert [(node.begin, node.end) for node in cfg.param_scheduler] == [
        (0, 8000), (8000, 9000), (8000, 9000), (0, 24)]
    single = Config(dict(make_config(4)._cfg_dict, param_scheduler=cfg.param_scheduler[0]))
    apply_accumulation(single, scale_warm_up=True)
    assert single.param_scheduler.end == 32000


@pytest.mark.parametrize('cfg', [make_config(1), Config(dict()), Config(dict(
    optim_wrapper=dict(accumulative_counts=2)))])
def test_nothing_to_say(cfg: Config, capsys: pytest.CaptureFixture) -> None:
    apply_accumulation(cfg, scale_warm_up=True)
    assert ''.join(capsys.readouterr()) == ''


@pytest.mark.parametrize('changes, kept', [
    ({}, True), ({'launcher': 'pytorch'}, False), ({'test_dataloader.batch_size': 2}, False),
    ({'test_dataloader.sampler.shuffle': True}, False), ({'model.type': 'ATSS'}, False),
    ({'model.type': 'mmdcnv4.TwoStageBEVFormerV2'}, True), ({'model.cache_maps': False}, False)])
def test_maps_are_kept_where_samples_come_in_order(changes: dict, kept: bool) -> None:
    cfg = Config(dict(launcher='none', model=dict(type='BEVFormerV2'), test_dataloader=dict(
        batch_size=1, sampler=dict(type='DefaultSampler', shuffle=False))))
    cfg.merge_from_dict(changes)
    apply_map_cache(cfg)
    assert cfg.model.get('cache_maps', False) == kept
