# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: every import statement and every #include against one table."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / 'mmdcnv4'
HOST = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmdet3d', 'mmpretrain')
EVERYTHING = ('mmdcnv4',)

# layer -> (own modules it may import, host packages it may import); the longest name counts
TABLE = {
    'mmdcnv4': (('mmdcnv4.ops', 'mmdcnv4.registration', 'mmdcnv4.version'), ()),
    'mmdcnv4.version': ((), ()),
    'mmdcnv4.errors': ((), ()),
    'mmdcnv4.registration': (EVERYTHING, ()),
    'mmdcnv4.registry': ((), ('mmengine',)),
    'mmdcnv4.utils': (('mmdcnv4.registration',), ()),
    'mmdcnv4.safe_files': (('mmdcnv4.errors',), ('mmengine',)),
    'mmdcnv4.info': (EVERYTHING, ('mmengine', 'mmcv')),
    'mmdcnv4.testing': (('mmdcnv4.ops',), ()),
    'mmdcnv4.ops': (('mmdcnv4.ops', 'mmdcnv4._C'), ()),
    'mmdcnv4.models.checkpoint': (('mmdcnv4.errors',), ('mmengine',)),
    'mmdcnv4.models.losses': (('mmdcnv4.errors',), ('mmengine',)),
    'mmdcnv4.models.layers': (
        ('mmdcnv4.errors', 'mmdcnv4.ops', 'mmdcnv4.models.layers', 'mmdcnv4.models.checkpoint'),
        ('mmengine', 'mmcv')),
    'mmdcnv4.models.backbones': (
        ('mmdcnv4.errors', 'mmdcnv4.ops', 'mmdcnv4.models.layers', 'mmdcnv4.models.checkpoint'),
        ('mmengine', 'mmcv')),
    'mmdcnv4.models.replacement': (
        ('mmdcnv4.errors', 'mmdcnv4.ops', 'mmdcnv4.models.layers'), ('mmengine', 'mmcv')),
    'mmdcnv4.models.diffusion': (('mmdcnv4.models.replacement',), ()),
    # backbones only through the registry
    'mmdcnv4.bevformer_v2': (('mmdcnv4.errors', 'mmdcnv4.safe_files', 'mmdcnv4.bevformer_v2',
                              'mmdcnv4.ops', 'mmdcnv4.models.checkpoint',
                              'mmdcnv4.checks.weights',
                              'mmdcnv4.models.layers.multi_scale_attention'),
                             ('mmengine', 'mmcv', 'mmdet', 'mmdet3d')),
    'mmdcnv4.datasets': (('mmdcnv4.datasets', 'mmdcnv4.errors'),
                         ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmdet3d')),
    # of a model and its weights; must know nothing of runs and data, as the other checks do
    'mmdcnv4.checks.weights': (('mmdcnv4.errors',), ('mmengine',)),
    'mmdcnv4.checks': (('mmdcnv4.checks', 'mmdcnv4.errors'), ('mmengine',)),
    'mmdcnv4.engine': (('mmdcnv4.engine', 'mmdcnv4.checks', 'mmdcnv4.errors'), ('mmengine',)),
    # changes modules of a model, whatever the model is
    'mmdcnv4.engine.hooks.multi_scale_attention': (
        ('mmdcnv4.models.layers.multi_scale_attention',), ('mmengine',)),
    # the tools' start-up; it may say which registrations were skipped
    'mmdcnv4.cli': (('mmdcnv4.cli', 'mmdcnv4.engine', 'mmdcnv4.checks', 'mmdcnv4.errors',
                     'mmdcnv4.registration', 'mmdcnv4.safe_files'), ('mmengine',)),
}
TORCH_FREE_HEADERS = ('bilinear.h', 'dcnv4_params.h', 'launch_plan.h', 'ms_deform_attn_params.h',
                      'window_plan.h')


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def imports(path):
    """Absolute names of everything that a file imports, at any depth."""
    package = module_name(path).split('.')
    if path.name != '__init__.py':
        package = package[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            base = '.'.join(base + ([node.module] if node.module else []))
            for alias in node.names:
                full = f'{base}.{alias.name}'
                yield (full if is_module(full) else base), node.lineno


def is_module(name):
    path = ROOT.joinpath(*name.split('.'))
    return path.with_suffix('.py').is_file() or (path / '__init__.py').is_file()


def covers(allowed, name):
    return any(name == item or name.startswith(item + '.') for item in allowed)


def layer_of(name):
    layers = [layer for layer in TABLE if covers((layer,), name)]
    return max(layers, key=len)


def violations(path):
    name = module_name(path)
    own, host = TABLE[layer_of(name)]
    if path.name == '__init__.py':
        own = (*own, name)
    for target, line in imports(path):
        top = target.split('.')[0]
        if top == 'mmdcnv4' and not covers(own, target) or top in HOST and top not in host:
            yield f'{path.relative_to(ROOT)}:{line}: {name} must not import {target}'


FILES = sorted(PACKAGE.rglob('*.py'))


@pytest.mark.parametrize('path', FILES, ids=[module_name(path) for path in FILES])
def test_imports(path):
    assert list(violations(path)) == []


def test_every_layer_is_in_the_table():
    """A new subpackage must be entered, rather than fall under the rule of the package."""
    allowed = {'mmdcnv4', *TABLE, 'mmdcnv4.models'}
    for path in FILES:
        name = module_name(path)
        assert name in allowed or layer_of(name) != 'mmdcnv4', name


def test_backbones_do_not_import_each_other():
    for path in (PACKAGE / 'models' / 'backbones').glob('[!_]*.py'):
        others = [target for target, _ in imports(path)
                  if target.startswith('mmdcnv4.models.backbones')]
        assert others == [], path


@pytest.mark.parametrize('text, bad', [
    ('from ..models import layers', True), ('import mmdet', True), ('import torch', False),
    ('from . import contract', False), ('def f():\n    from mmengine import Config', True),
    ('from mmdcnv4.models.layers import norm', True)])
def test_the_check_itself(tmp_path, monkeypatch, text, bad):
    monkeypatch.setattr(sys.modules[__name__], 'ROOT', tmp_path)
    path = tmp_path / 'mmdcnv4' / 'ops' / 'example.py'
    path.parent.mkdir(parents=True)
    path.write_text(text + '\n')
    assert bool(list(violations(path))) == bad


def includes(path):
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


SOURCES = sorted(path for path in (ROOT / 'csrc').rglob('*')
                 if path.suffix in ('.h', '.inl', '.cpp', '.cu', '.cuh'))
# kernels know no torch; what is compiled for several instruction sets shares no template with it
TORCH_FREE_KERNELS = [path for path in SOURCES if path.parent.name == 'cpu' and (
    path.suffix in ('.h', '.inl') or path.name.startswith('kernels_'))]


@pytest.mark.parametrize('path', SOURCES, ids=lambda path: path.name)
def test_includes(path):
    folders = path.relative_to(ROOT / 'csrc').parts[:-1]
    device = folders[0] if folders else 'csrc'
    for name in includes(path):
        other = dict(cpu='cuda', cuda='cpu').get(device)
        assert other is None or f'{other}/' not in name, f'{path.name} includes {name}'
        assert device != 'csrc' or not name.startswith(('cpu/', 'cuda/')), name
        # the direct kernels do not know those on tensor cores
        assert device != 'cuda' or 'window' in folders or 'window/' not in name, name
        if path.name in TORCH_FREE_HEADERS:
            is_own = name in TORCH_FREE_HEADERS
            assert is_own or re.fullmatch(r'[a-z_]+', name), f'{path.name} includes {name}'


@pytest.mark.parametrize('path', TORCH_FREE_KERNELS, ids=lambda path: path.name)
def test_cpu_kernels_know_no_torch(path):
    own = {other.name for other in TORCH_FREE_KERNELS} | {
        f'../{name}' for name in TORCH_FREE_HEADERS}
    standard = {'cmath', 'cstdint', 'cstdlib', 'cstring', 'new', 'type_traits'}
    assert set(includes(path)) <= own | standard
    if path.suffix == '.inl':  # all of the standard library comes by kernel_includes.h
        assert not set(includes(path)) & standard


@pytest.mark.parametrize('path', [path for path in TORCH_FREE_KERNELS if path.suffix != '.cpp']
                         + [ROOT / 'csrc' / name for name in TORCH_FREE_HEADERS],
                         ids=lambda path: path.name)
def test_a_file_stands_alone(path):
    """An editor that opens it sees no undeclared name."""
    compiler = shutil.which(os.environ.get('CXX', 'c++'))
    if compiler is None:
        pytest.skip('no C++ compiler')
    result = subprocess.run([compiler, '-std=c++17', '-fsyntax-only', '-x', 'c++', str(path)],
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[:3000]
