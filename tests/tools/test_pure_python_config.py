# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Configs with classes instead of names, and without a default_scope, in every tool."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from helpers.tool_runner import TINY, data_options, load_tool
from mmdcnv4.checks.config import default_scope, type_name
from mmdcnv4.cli import config, distributed

CONFIG = str(TINY / 'pure_python.py')


@pytest.fixture(scope='module')
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp('pure') / 'random.pth'
    torch.save(dict(state_dict=MODELS.build(Config.fromfile(CONFIG).model).state_dict()), file)
    return str(file)


def test_predictions_and_pictures(scenes: Path, weights: str, tmp_path: Path) -> None:
    metrics = load_tool('test').main([
        CONFIG, weights, '--work-dir', str(tmp_path / 'run'), '--show-dir',
        str(tmp_path / 'pictures'), '--out', str(tmp_path / 'a.pkl'), *data_options(scenes)])
    assert 'coco/bbox_mAP' in metrics
    assert len(list((tmp_path / 'pictures').glob('*.jpg'))) == 6
    assert len(pickle.loads((tmp_path / 'a.pkl').read_bytes())) == 6


def test_image_demo(scenes: Path, weights: str, tmp_path: Path) -> None:
    image = next((scenes / 'coco/images/val').iterdir())
    load_tool('demo/image_demo').main([str(image), CONFIG, weights, '--device', 'cpu',
                                       '--out-dir', str(tmp_path / 'out')])
    assert (tmp_path / 'out' / image.name).is_file()


def test_cost() -> None:
    flops = load_tool('analysis_tools/get_flops')
    assert flops.count(config.read_config(CONFIG), 64, 64).parameters > 10_000


def test_amp_and_synchronised_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = config.read_config(CONFIG)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    config.apply_amp(cfg)
    assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
    cfg.model.neck.norm_cfg.type = nn.SyncBatchNorm
    distributed._replace_sync_bn(cfg)
    assert cfg.model.neck.norm_cfg.type == 'BN'


def test_masks_are_written_as_run_lengths(tmp_path: Path) -> None:
    """By mmdet's own metric, which encodes them; the one of MMEngine writes them pixel by pixel."""
    assert config.dump_metric(config.read_config(CONFIG), str(tmp_path / 'a.pkl'))['type'] == \
        'mmdet.DumpDetResults'


def test_library_of_a_config() -> None:
    models = pytest.importorskip('mmdet.models')

    class Own(models.RetinaNet):
        """Of a project that builds on mmdet."""

    for kind, scope in ((models.RetinaNet, 'mmdet'), (Own, 'mmdet'), ('mmseg.EncoderDecoder',
                        'mmseg'), ('Unknown', None), (nn.Module, None), (None, None)):
        assert default_scope(Config(dict(model=dict(type=kind)))) == scope
    assert default_scope(Config(dict(default_scope='a', model=dict(type=Own)))) == 'a'
    assert type_name(dict(type=Own)) == 'Own' and type_name(dict(type='mmdet.A')) == 'A'
    bevformer = pytest.importorskip('mmdcnv4.bevformer_v2.models.detector')
    assert default_scope(Config(dict(model=dict(type=bevformer.BEVFormerV2)))) == 'mmdet3d'
