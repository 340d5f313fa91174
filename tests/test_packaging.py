# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Installing without a compiler gives a working package, and the source archive is complete."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from mmdcnv4 import __version__, info

ROOT = Path(__file__).resolve().parents[1]

# An editable install of this repository would lend its _C to the package under test.
USE_WITHOUT_KERNELS = """
import sys
import warnings
import torch
sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in repr(finder).lower()]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter('always')
    from mmdcnv4.ops import dcnv4
    value, offset_mask = torch.ones(2, 3, 5, 4), torch.zeros(2, 3, 5, 32)
    offset_mask[..., 18 + 4] = 1  # the middle tap of the only group
    for _ in range(3):
        out = dcnv4(value, offset_mask, kernel_size=3, groups=1, padding=1)
ours = [str(w.message) for w in caught if 'mmdcnv4' in str(w.message)]
assert torch.equal(out, value), out
assert len(ours) == 1 and 'compiler' in ours[0] and 'pip install' in ours[0], ours
"""


def run(*command, **environment):
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment},
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return result.stdout + result.stderr


@pytest.fixture(scope='module')
def wheel_without_compiler(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    log = run(sys.executable, 'setup.py', 'build', '--build-base', str(folder / 'build'),
              'bdist_wheel', '--dist-dir', str(folder), CXX='no-such-compiler')
    return next(folder.glob('*.whl')), log


def test_install_without_compiler_says_so(wheel_without_compiler):
    wheel, log = wheel_without_compiler
    assert 'no C++ compiler was found (no-such-compiler)' in log
    assert 'WITHOUT compiled kernels' in log
    names = zipfile.ZipFile(wheel).namelist()
    assert 'mmdcnv4/ops/reference.py' in names
    assert not any(name.endswith(('.so', '.pyd')) for name in names)
    # neither dev/ nor benchmarks/, nor tests/: they need the sources
    top = {name.split('/')[0] for name in names}
    assert top == {'mmdcnv4', f'mmdcnv4-{__version__}.dist-info'}
    recipes = {name.split('/')[2] for name in names if name.startswith('mmdcnv4/.mim/')}
    assert recipes == {'configs', 'tools', 'model-index.yml'}


def test_package_without_kernels_works_with_one_warning(wheel_without_compiler, tmp_path):
    zipfile.ZipFile(wheel_without_compiler[0]).extractall(tmp_path)
    result = subprocess.run([sys.executable, '-c', USE_WITHOUT_KERNELS], cwd=tmp_path,
                            env={**os.environ, 'PYTHONPATH': str(tmp_path)},
                            capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_source_archive_is_complete(tmp_path):
    run(sys.executable, 'setup.py', 'egg_info', '--egg-base', str(tmp_path), 'sdist',
        '--dist-dir', str(tmp_path), MMDCNV4_NATIVE='0')
    with tarfile.open(next(tmp_path.glob('*.tar.gz'))) as archive:
        names = archive.getnames()
    held = {'/'.join(name.split('/')[1:]) for name in names}
    tracked = [name for name in run('git', 'ls-files').split() if not name.startswith('.')]
    missing = [name for name in tracked if name not in held]
    assert not missing, missing


def test_no_links_are_tracked():
    """A link `.venv`, once pushed, takes the place of the environment of whoever pulls it."""
    links = [line for line in run('git', 'ls-files', '--stage').splitlines()
             if line.startswith('120000')]
    assert not links, links


def test_requirements_are_the_extras():
    """`make` installs from the file, a user from the extra."""
    tomllib = pytest.importorskip('tomllib')
    extras = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project'][
        'optional-dependencies']
    lines = (ROOT / 'requirements/dev.txt').read_text().splitlines()
    own = [name for name in extras['dev'] if name != 'mmdcnv4[test]']
    assert [line for line in lines if not line.startswith('#')] == extras['test'] + own


def test_the_version_has_its_changes():
    assert f'\n## {__version__} - ' in (ROOT / 'CHANGELOG.md').read_text()


def test_info_reports_kernels_and_registrations():
    out = run(sys.executable, '-m', 'mmdcnv4.info')
    for word in ('torch', 'CPU kernels', 'CUDA kernels', 'in use', 'FlashInternImage'):
        assert word in out, out


def test_info_goes_on_with_a_backend_that_does_not_exist():
    out = run(sys.executable, '-m', 'mmdcnv4.info', MMDCNV4_BACKEND='foo')
    assert "invalid ('foo')" in out and 'FlashInternImage' in out


def test_info_names_a_cpu_build_of_torch_first(monkeypatch):
    monkeypatch.setattr(torch.version, 'cuda', None)
    monkeypatch.setattr(info._extension, 'build_info', {})
    monkeypatch.setattr(info._extension, 'is_available', False)
    assert info._cuda_kernels() == 'missing: torch is a CPU build'


def setup_functions():
    """What setup.py defines, without building anything."""
    code = ("import json, os, runpy, sys; sys.argv = ['setup.py', '--version']\n"
            "os.environ['MMDCNV4_NATIVE'] = '0'; scope = runpy.run_path('setup.py')\n")
    return lambda expression: run(sys.executable, '-c',
                                  f'{code}print({expression})').split('\n')[-2]


def test_default_architectures():
    """PTX of one that all later GPUs take; Orin and Thor, where torch knows them, beside Arm."""
    from torch.utils import cpp_extension
    source = Path(cpp_extension.__file__).read_text()
    code = ("[scope['platform'].__dict__.update(machine=lambda: {!r}), "
            "scope['default_architectures']((13, 0))][1]")
    first = ['7.5', '8.0+PTX', '8.6']
    newer = [name for name in ('10.0', '12.0') if f"'{name}'" in source]
    assert setup_functions()(code.format('x86_64')).split(';') == [*first, '9.0', *newer]
    newer += ['11.0'] if "'11.0a'" in source else []
    assert setup_functions()(code.format('aarch64')).split(';') == [*first, '8.7', '9.0', *newer]


def test_an_empty_variable_is_none():
    value_of = setup_functions()
    compiler, architectures = value_of(
        "[scope['cuda_flags'].__globals__.update(toolkit_version=lambda home: (13, 0)), "
        "os.environ.update(CXX='', TORCH_CUDA_ARCH_LIST=''), scope['cuda_flags']('/'), "
        "(scope['compiler_problem']() or 'works') + ' | ' + os.environ['TORCH_CUDA_ARCH_LIST']"
        "][-1]").split(' | ')
    assert compiler in ('works', 'no C++ compiler was found (c++)')
    assert architectures.startswith('7.5;')
    if torch.version.cuda is None:
        with pytest.raises(AssertionError, match='needs nvcc and a CUDA build of torch'):
            value_of("[os.environ.update(MMDCNV4_CUDA='', FORCE_CUDA='1'), "
                     "scope['cuda_wanted']()]")


def test_probe_has_the_standard_of_torch(tmp_path):
    """A compiler that knows no C++20 must not pass where torch's headers are compiled as such."""
    compiler = tmp_path / 'old'
    compiler.write_text('#!/bin/sh\ncase "$*" in *-std=c++17*) exit 0;; esac\n'
                        'echo unknown standard >&2; exit 1\n')
    compiler.chmod(0o755)
    standard = setup_functions()("scope['cpp_standard']()")
    found = setup_functions()(f"[os.environ.update(CXX={str(compiler)!r}), "
                              "scope['compiler_problem']()][1].split()")
    assert standard in ('17', '20', '23')
    assert ("'standard'" in found) == (standard != '17'), found


@pytest.mark.parametrize('program', ['pip', 'uv pip'])
def test_without_torch_the_build_stops_and_says_what_to_type(tmp_path, program):
    """An isolated build of uv sees no torch, and shows no warnings."""
    code = ('import sys\nfrom importlib.abc import MetaPathFinder\n'
            'class Hidden(MetaPathFinder):\n'
            '    def find_spec(self, name, path=None, target=None):\n'
            '        if name.split(".")[0] == "torch": raise ImportError("no torch here")\n'
            'sys.meta_path.insert(0, Hidden())\n'
            "import importlib.util, runpy; importlib.util.find_spec = lambda name: None\n"
            f"sys.argv = ['setup.py', 'build', '--build-base', {str(tmp_path)!r}]\n"
            "runpy.run_path('setup.py', run_name='__main__')\n")
    environment = {key: value for key, value in os.environ.items() if key != 'UV'}
    environment.update(MMDCNV4_NATIVE='', **({'UV': '/bin/uv'} if program == 'uv pip' else {}))
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 1, done.stderr
    for line in ('install setuptools wheel ninja', 'install --no-build-isolation --editable .'):
        assert f'\n    {program} {line}\n' in done.stderr
    assert 'isolated' in done.stderr and 'MMDCNV4_NATIVE=0' in done.stderr
