# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What the tests of the configs share: the list of configs, reading and building them."""

from __future__ import annotations

import os
from copy import deepcopy
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
LEAVES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob('[!_]*/*.py'))
BASES = sorted(path.relative_to(CONFIGS).as_posix() for path in CONFIGS.glob('_base_/**/*.py'))
ZOO = [name for name in LEAVES
       if name.startswith(('convnext_dcnv4/', 'dat/', 'dynamic_mobile_former/',
                           'flash_intern_image/', 'intern_image/', 'vit_dcnv4/'))]
SHARED_DATA = Path(os.environ.get('MMDCNV4_SHARED', ROOT.parent / 'shared')) / 'data'


def read(name):
    """Config below `configs/`; skips where the library that it inherits is not installed."""
    if '/image-classifier' in name:
        pytest.importorskip('mmpretrain')
    return deepcopy(_read_once(name))


@cache
def _read_once(name):
    return Config.fromfile(CONFIGS / name)


def build_model(cfg, device='cpu'):
    pytest.importorskip(cfg.default_scope)
    import_module(f'{cfg.default_scope}.models')
    if 'data_preprocessor' in cfg:  # as mmengine's runner does
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    with DefaultScope.overwrite_default_scope(cfg.default_scope), torch.device(device):
        return MODELS.build(cfg.model)


def build_optimiser(cfg, model):
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return build_optim_wrapper(model, cfg.optim_wrapper)


def leaf(start):
    """The one config of the zoo whose file name begins with `start`."""
    found = [name for name in ZOO if Path(name).name.startswith(start)]
    assert len(found) == 1, (start, found)
    return found[0]
