# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Configs and tools inside an installed package, and configs elsewhere that inherit them."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile

import pytest
from mmengine.fileio import load
from zoo import CONFIGS, LEAVES, ROOT

# Runs with the unpacked wheel first on the path, in a folder outside the repository.
USE = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]
import mmdcnv4
assert 'unpacked' in mmdcnv4.__file__, mmdcnv4.__file__
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmdcnv4.engine import forget_scope
import mmdet.datasets, mmdet.models, mmseg.datasets, mmseg.models
for path, scope, count in (('detection.py', 'mmdet', 48_819_696),
                           ('segmentation.py', 'mmseg', 58_974_252)):
    cfg = Config.fromfile(path)
    forget_scope(cfg._cfg_dict)
    with DefaultScope.overwrite_default_scope(scope):
        with torch.device('meta'):
            model = MODELS.build(cfg.model)
        dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, lazy_init=True))
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(dataset.pipeline.transforms) == len(cfg.train_dataloader.dataset.pipeline)
    assert cfg.optim_wrapper.optimizer.lr == 3e-5 and cfg.optim_wrapper.optimizer.type == 'AdamW'
    assert "'_scope_': 'mmdcnv4'" not in str(cfg)
"""
OUTSIDE = """
_base_ = 'mmdcnv4::flash_intern_image/{}.py'
optim_wrapper = dict(optimizer=dict(lr=3e-5))
"""


@pytest.fixture(scope='module')
def unpacked(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    result = subprocess.run(
        [sys.executable, 'setup.py', '-q', 'build', '--build-base', str(folder / 'build'),
         'bdist_wheel', '--dist-dir', str(folder)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, 'MMDCNV4_NATIVE': '0'})
    assert result.returncode == 0, result.stderr[-2000:]
    zipfile.ZipFile(next(folder.glob('*.whl'))).extractall(folder / 'unpacked')
    return folder / 'unpacked'


def environment(unpacked):
    return {**os.environ, 'PYTHONPATH': str(unpacked), 'PYTHONWARNINGS': 'ignore',
            'MMDCNV4_BACKEND': 'pytorch', 'OMP_NUM_THREADS': '1'}


def test_the_wheel_holds_configs_and_tools(unpacked):
    mim = unpacked / 'mmdcnv4' / '.mim'
    assert {path.relative_to(mim / 'configs').as_posix() for path in
            (mim / 'configs').glob('[!_]*/*.py')} == set(LEAVES)
    assert (mim / 'configs' / '_base_' / 'plugin.py').is_file()
    # what `mim train` and `mim test` start
    assert (mim / 'tools' / 'train.py').is_file() and (mim / 'tools' / 'test.py').is_file()
    assert (mim / 'model-index.yml').is_file()
    assert not list(mim.rglob('__pycache__'))


def test_a_config_elsewhere_inherits_from_the_wheel(unpacked, tmp_path):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    (tmp_path / 'detection.py').write_text(
        OUTSIDE.format('mask-rcnn_flash-intern-image-t_fpn_8xb2-1x_coco'))
    (tmp_path / 'segmentation.py').write_text(
        OUTSIDE.format('upernet_flash-intern-image-t_8xb2-160k_ade20k-512x512'))
    result = subprocess.run([sys.executable, '-c', USE], cwd=tmp_path, capture_output=True,
                            text=True, env=environment(unpacked))
    assert result.returncode == 0, result.stderr[-3000:]


def test_tools_of_the_wheel_start(unpacked, tmp_path):
    result = subprocess.run(
        [sys.executable, str(unpacked / 'mmdcnv4' / '.mim' / 'tools' / 'train.py'), 'absent.py'],
        cwd=tmp_path, capture_output=True, text=True, env=environment(unpacked))
    assert 'the config absent.py does not exist' in result.stderr


def test_index_lists_every_recipe_once():
    index = load(ROOT / 'model-index.yml')
    listed = []
    for name in index['Import']:
        meta = load(ROOT / name)
        (collection,) = meta['Collections']
        assert (ROOT / collection['README']).is_file()
        for model in meta['Models']:
            assert model['In Collection'] == collection['Name']
            assert model['Name'] + '.py' == model['Config'].rpartition('/')[-1]
            listed.append(model['Config'].partition('/')[-1])
    folders = {name.split('/')[1] for name in index['Import']}
    assert sorted(listed) == [name for name in LEAVES if name.split('/')[0] in folders]
    assert {'flash_intern_image', 'intern_image', 'dcnv4'} <= folders


def test_index_has_the_parameters_that_are_built():
    pytest.importorskip('mmdet')
    from test_configs import EXACT
    for path in CONFIGS.glob('*/metafile.yml'):
        for model in load(path)['Models']:
            for start, count in EXACT.items():
                if model['Name'].startswith(start):
                    assert model['Metadata']['Parameters'] == count
