# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The synthetic rig, the tiny config on it, and batches of it; all skipped without mmdet3d."""

from __future__ import annotations

import copy
import importlib.util

import pytest

HAS_MMDET3D = importlib.util.find_spec('mmdet3d') is not None
collect_ignore_glob = [] if HAS_MMDET3D else ['test_*.py']


def pytest_report_header():
    return None if HAS_MMDET3D else 'tests/bevformer_v2: left out, mmdet3d is not installed'


@pytest.fixture(scope='session')
def rig(tmp_path_factory):
    """Folder with two scenes of three key frames."""
    from mmdcnv4.datasets import synthetic_rig
    root = tmp_path_factory.mktemp('rig')
    synthetic_rig.write(root, num_frames=3)
    return root


@pytest.fixture(autouse=True)
def _scope():
    from mmengine.registry import DefaultScope

    import mmdcnv4.bevformer_v2  # noqa: F401
    with DefaultScope.overwrite_default_scope('mmdet3d'):
        yield


@pytest.fixture
def tiny(rig):
    from mmengine.config import Config

    from helpers.bevformer import TINY
    cfg = Config.fromfile(TINY)
    cfg.train_dataloader.dataset.data_root = str(rig)
    return cfg


@pytest.fixture
def make_model(tiny):
    def build(**changes):
        """The tiny model; keyword arguments are merged into its config."""
        import torch
        from mmdet3d.registry import MODELS
        cfg = copy.deepcopy(tiny)
        cfg.merge_from_dict(dict(model=changes))
        if tuple(cfg.model.frames) == (0,):
            cfg.model.temporal_fusion = None
        torch.manual_seed(0)
        return MODELS.build(cfg.model)
    return build


@pytest.fixture
def make_dataset(tiny):
    def build(**changes):
        """The tiny training set; keyword arguments replace those of its config."""
        from mmdet3d.registry import DATASETS
        cfg = copy.deepcopy(tiny.train_dataloader.dataset)
        cfg.update(changes)
        return DATASETS.build(cfg)
    return build


@pytest.fixture
def make_batch(make_dataset):
    def build(indices=(0, 1), **changes):
        from mmengine.dataset import pseudo_collate
        dataset = make_dataset(**changes)
        return pseudo_collate([dataset[index] for index in indices])
    return build
