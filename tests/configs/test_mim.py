# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Configs and tools inside an installed package, and configs elsewhere that inherit them."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path
from typing import NamedTuple

import mmengine
import pytest
from mmengine.config import Config
from mmengine.fileio import load

from helpers.zoo import CONFIGS, LEAVES, ROOT

# Runs in an environment where the wheel is installed, in a folder outside the repository.
USE = """
import mmdcnv4
import sys
assert mmdcnv4.__file__.startswith(sys.prefix), mmdcnv4.__file__
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS, DefaultScope
import mmdet.datasets, mmdet.models, mmseg.datasets, mmseg.models
for path, scope, count in (('detection.py', 'mmdet', 48_819_696),
                           ('segmentation.py', 'mmseg', 58_974_252)):
    cfg = Config.fromfile(path)
    with DefaultScope.overwrite_default_scope(scope):
        with torch.device('meta'):
            model = MODELS.build(cfg.model)
        dataset = DATASETS.build(dict(cfg.train_dataloader.dataset, lazy_init=True))
    assert sum(p.numel() for p in model.parameters()) == count
    assert len(dataset.pipeline.transforms) == len(cfg.train_dataloader.dataset.pipeline)
    assert cfg.optim_wrapper.optimizer.lr == 3e-5 and cfg.optim_wrapper.optimizer.type == 'AdamW'
"""
OUTSIDE = """
_base_ = 'mmdcnv4::flash_intern_image/{}.py'
optim_wrapper = dict(optimizer=dict(lr=3e-5))
"""


class Installed(NamedTuple):
    """A virtual environment with the wheel; all other packages are those of the tests."""

    python: Path
    package: Path

    def run(self, *arguments, cwd):
        """Finished process of the Python of the environment."""
        return subprocess.run(
            [str(self.python), *arguments], cwd=cwd, capture_output=True, text=True,
            env={**os.environ, 'PYTHONPATH': '', 'PYTHONWARNINGS': 'ignore',
                 'MMDCNV4_BACKEND': 'pytorch', 'OMP_NUM_THREADS': '1'})


@pytest.fixture(scope='module')
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    result = subprocess.run(
        [sys.executable, 'setup.py', '-q', 'build', '--build-base', str(folder / 'build'),
         'bdist_wheel', '--dist-dir', str(folder)], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, 'MMDCNV4_NATIVE': '0'})
    assert result.returncode == 0, result.stderr[-2000:]
    venv.create(folder / 'venv', with_pip=False)
    python = folder / 'venv' / 'bin' / 'python'
    result = subprocess.run(
        [sys.executable, '-m', 'pip', '--python', str(python), 'install', '--no-deps',
         '--no-index', '--no-compile', str(next(folder.glob('*.whl')))],
        capture_output=True, text=True, env={**os.environ, 'PYTHONPATH': ''})
    assert result.returncode == 0, result.stderr[-2000:]
    (site_packages,) = folder.glob('venv/lib/python*/site-packages')
    # a folder named in a .pth file is searched, but its own .pth files, such as that of an
    # editable installation, are not read
    folders = {sysconfig.get_path('purelib'), str(Path(mmengine.__file__).parents[1])}
    (site_packages / 'dependencies.pth').write_text('\n'.join(folders))
    return Installed(python, site_packages / 'mmdcnv4')


def test_the_wheel_holds_configs_and_tools(installed):
    mim = installed.package / '.mim'
    assert {path.relative_to(mim / 'configs').as_posix() for path in
            (mim / 'configs').glob('[!_]*/*.py')} == set(LEAVES)
    assert (mim / 'configs' / '_base_' / 'plugin.py').is_file()
    # what `mim train` and `mim test` start
    assert (mim / 'tools' / 'train.py').is_file() and (mim / 'tools' / 'test.py').is_file()
    assert (mim / 'model-index.yml').is_file()
    assert not list(mim.rglob('__pycache__'))
    # what builds, checks and times the sources is of no use without them
    assert {path.name for path in mim.iterdir()} == {'configs', 'tools', 'model-index.yml'}
    assert {path.relative_to(mim / 'tools').as_posix()
            for path in (mim / 'tools').rglob('*') if path.is_file()} == {
        path.relative_to(ROOT / 'tools').as_posix() for path in (ROOT / 'tools').rglob('*')
        if path.is_file() and '__pycache__' not in path.parts}


def test_a_config_elsewhere_inherits_from_the_wheel(installed, tmp_path):
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    (tmp_path / 'detection.py').write_text(
        OUTSIDE.format('mask-rcnn_flash-intern-image-t_fpn_8xb2-1x_coco'))
    (tmp_path / 'segmentation.py').write_text(
        OUTSIDE.format('upernet_flash-intern-image-t_8xb2-160k_ade20k-512x512'))
    result = installed.run('-c', USE, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]


def test_a_config_elsewhere_inherits_from_the_repository(tmp_path):
    """As in an editable installation, which has no `.mim`."""
    name = 'mask-rcnn_flash-intern-image-t_fpn_8xb2-1x_coco'
    (tmp_path / 'a.py').write_text(OUTSIDE.format(name))
    (tmp_path / 'b.py').write_text("_base_ = 'mmdcnv4::flash_intern_image/absent.py'")
    cfg = Config.fromfile(tmp_path / 'a.py')
    assert cfg.optim_wrapper.optimizer.lr == 3e-5
    assert cfg.model == Config.fromfile(ROOT / f'configs/flash_intern_image/{name}.py').model
    with pytest.raises(FileNotFoundError, match='configs/flash_intern_image/absent.py'):
        Config.fromfile(tmp_path / 'b.py')


def test_tools_of_the_wheel_start(installed, tmp_path):
    result = installed.run(str(installed.package / '.mim' / 'tools' / 'train.py'), 'absent.py',
                           cwd=tmp_path)
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
