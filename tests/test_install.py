# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The install lines of the README, word for word, in a fresh clone."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def install_lines() -> list[str]:
    """The first block of commands below the heading `Install`."""
    text = (ROOT / 'README.md').read_text()
    return re.search(r'\n## Install\n.*?```shell\n(.*?)```', text, re.DOTALL)[1].splitlines()


def test_the_readme_installs_and_looks():
    """An installation that is not editable is hidden by the sources of the clone."""
    install, look = install_lines()
    assert install.startswith('pip install ') and install.endswith(' .')
    assert {'--no-build-isolation', '--editable'} <= set(install.split())
    assert look == 'python -m mmdcnv4.info'


def clone_and_environment(folder):
    """A clone, the `bin` of an environment that borrows the packages of this one but not mmdcnv4,
    and the variables of a shell in it."""
    clone, bin_folder = folder / 'clone', folder / 'venv' / 'bin'
    subprocess.run(['git', 'clone', '--quiet', ROOT, clone], check=True)
    subprocess.run([sys.executable, '-m', 'venv', folder / 'venv'], check=True)
    # before Python 3.12 it brings a setuptools that is older than torch wants
    subprocess.run([bin_folder / 'python', '-m', 'pip', '-q', 'uninstall', '-y', 'setuptools'],
                   check=True)
    (site,) = (folder / 'venv').glob('lib/python*/site-packages')
    # folders whose own .pth files do not count: no editable installation is borrowed
    (site / 'borrowed.pth').write_text('\n'.join(
        path for path in sys.path if path.endswith('site-packages')))
    environment = {key: value for key, value in os.environ.items()
                   if key not in ('PYTHONPATH', 'PYTHONHOME', 'VIRTUAL_ENV')}
    return clone, bin_folder, environment


@pytest.mark.slow
def test_the_lines_of_the_readme_in_a_clone(tmp_path):
    """Offline."""
    if shutil.which('git') is None or shutil.which(os.environ.get('CXX', 'c++')) is None:
        pytest.skip('needs git and a C++ compiler')
    clone, bin_folder, environment = clone_and_environment(tmp_path)
    environment.update(PIP_NO_INDEX='1', PATH=os.pathsep.join(
        [str(bin_folder), os.environ['PATH'], str(Path(sys.executable).parent)]))

    def run(command, folder):
        done = subprocess.run(['bash', '-ec', command], cwd=folder, env=environment, text=True,
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        assert done.returncode == 0, done.stdout[-4000:]
        return done.stdout

    run('\n'.join(install_lines()), clone)
    for folder in (clone, tmp_path):
        found = run(install_lines()[-1] + '\npython -c "import mmdcnv4; print(mmdcnv4.__file__)"',
                    folder)
        assert re.search(r'CPU kernels +(?!missing)\S', found), found
        assert found.splitlines()[-1] == str(clone / 'mmdcnv4' / '__init__.py')


def test_uv_takes_the_torch_of_the_environment(tmp_path):
    """Offline. setup.py asks for a compiler after torch; there is none, to save the minutes."""
    uv = shutil.which('uv')
    if uv is None or shutil.which('git') is None:
        pytest.skip('needs uv and git')
    clone, bin_folder, environment = clone_and_environment(tmp_path)
    environment.update(CXX='no-such-compiler', MMDCNV4_NATIVE='',
                       UV_CACHE_DIR=str(tmp_path / 'cache'))
    done = subprocess.run(
        [uv, 'pip', 'install', '--verbose', '--offline', '--no-deps', '--python',
         bin_folder / 'python', '.'], cwd=clone, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-4000:]
    assert 'no C++ compiler was found (no-such-compiler)' in done.stdout
