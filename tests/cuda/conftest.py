# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The emulator of the CUDA kernels, built once per state of their sources; kernels on a GPU."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Optional

import pytest
import torch

from helpers.gpu_cases import set_fast

ROOT = Path(__file__).parents[2]
CSRC, EMULATOR = ROOT / 'csrc', Path(__file__).parent / 'emulator'
FLAGS = ('-std=c++17', '-O1', '-g1', '-fno-strict-aliasing', '-Wall', '-Wextra', '-Werror',
         '-Wno-unknown-pragmas', '-fsanitize=address,undefined,float-cast-overflow',
         '-fno-sanitize-recover=all')


class EmulatorBuild:
    """Compiles the emulator while other tests run.

    The compilers are niced, so that they delay the tests as little as possible. Of the processes of
    one test run the first to start compiles, and the others wait for its program.
    """

    def __init__(self) -> None:
        self.compiler = os.environ.get('CXX', 'g++')
        # all but the bindings, which know torch
        kernels = sorted(path for path in (CSRC / 'cuda').rglob('*.cu')
                         if not path.name.endswith('_cuda.cu'))
        # the largest first: a core that is idle at the end costs nothing
        self.units = sorted([*EMULATOR.glob('*.cpp'), CSRC / 'launch_plan.cpp', *kernels],
                            key=lambda path: ('window' not in path.name, path.name))
        headers = [*CSRC.glob('*.h'), *(CSRC / 'cuda').rglob('*.*h'), *EMULATOR.glob('*.h')]
        digest = hashlib.sha256(' '.join((self.compiler, *FLAGS)).encode())
        for path in sorted({*self.units, *headers}):
            digest.update(path.read_bytes())
        self.program = ROOT / '.build' / 'emulator' / f'emulator-{digest.hexdigest()[:16]}'
        self.running: set[subprocess.Popen] = set()
        self.pool = ThreadPoolExecutor(os.cpu_count())
        self.linked: Optional[Future] = None

    def start(self) -> None:
        if self.program.exists() or shutil.which(self.compiler) is None:
            return
        self.program.parent.mkdir(parents=True, exist_ok=True)
        self.lock = (self.program.parent / 'lock').open('w')
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.compile_all()

    def compile_all(self) -> None:
        self.folder = tempfile.TemporaryDirectory(dir=self.program.parent)
        objects = [self.pool.submit(self.compile, path) for path in self.units]
        self.linked = self.pool.submit(self.link, objects)  # starts when all of them have started

    def compile(self, path: Path) -> str:
        compiled = f'{self.folder.name}/{path.name}.o'
        self.run('-I', str(EMULATOR), '-x', 'c++', '-c', str(path), '-o', compiled)
        return compiled

    def run(self, *arguments: str) -> None:
        process = subprocess.Popen(['nice', self.compiler, *FLAGS, *arguments],
                                   stderr=subprocess.PIPE, text=True)
        self.running.add(process)
        errors = process.communicate()[1]
        self.running.remove(process)
        if process.returncode != 0:
            raise RuntimeError(f'{self.compiler} {" ".join(arguments)} failed\n{errors[-4000:]}')

    def link(self, objects: list[Future]) -> None:
        try:
            linked = f'{self.folder.name}/emulator'
            self.run(*(future.result() for future in objects), '-o', linked)
            for old in self.program.parent.glob('emulator-*'):
                old.unlink()
            os.replace(linked, self.program)  # whole at every moment: another run may start it
        finally:
            fcntl.flock(self.lock, fcntl.LOCK_UN)

    def finish(self) -> Path:
        """Waits for the program; raises what the compiler said."""
        if self.linked is None and not self.program.exists():
            fcntl.flock(self.lock, fcntl.LOCK_EX)  # as long as another process compiles
            if not self.program.exists():  # it was stopped, or failed
                self.compile_all()
        if self.linked is not None:
            self.linked.result()
        return self.program

    def stop(self) -> None:
        """Where the tests end before the program is needed."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        for process in list(self.running):
            process.kill()
        self.pool.shutdown()
        if hasattr(self, 'folder'):
            self.folder.cleanup()
        if hasattr(self, 'lock'):
            self.lock.close()


_build: Optional[EmulatorBuild] = None


def pytest_collection_finish(session: pytest.Session) -> None:
    global _build
    if not session.config.option.collectonly and any(
            'emulator' in getattr(item, 'fixturenames', ()) for item in session.items):
        _build = EmulatorBuild()
        _build.start()


def pytest_unconfigure() -> None:
    if _build is not None:
        _build.stop()


@pytest.fixture(scope='session')
def emulator() -> Path:
    """Path of the program; see tests/cuda/emulator/main.cpp."""
    assert _build is not None
    if shutil.which(_build.compiler) is None:
        pytest.skip(f'the emulator of the CUDA kernels needs a C++ compiler ({_build.compiler})')
    return _build.finish()


@pytest.fixture(params=['direct', 'fast'])
def both_paths(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test on a GPU with the tensor-core kernels forced off, and forced on."""
    set_fast(request.param == 'fast')
    yield request.param
    set_fast()


@pytest.fixture
def fast_path() -> Iterator[None]:
    """Runs a test on a GPU with the tensor-core kernels."""
    set_fast(True)
    yield
    set_fast()


@pytest.fixture
def poisoned_memory() -> None:
    """What the allocator gives away next holds NaN: an element that nobody writes is seen."""
    # 512 KiB and 32 MiB: blocks of its two pools
    blocks = [torch.full((size,), torch.nan, device='cuda') for size in [2**17] * 16 + [2**23] * 4]
    del blocks
