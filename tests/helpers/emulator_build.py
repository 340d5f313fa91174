# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Compiles the emulator of the CUDA kernels: tests/cuda/emulator and csrc/cuda as ordinary C++."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).parents[2]
CSRC, EMULATOR = ROOT / 'csrc', ROOT / 'tests' / 'cuda' / 'emulator'
FLAGS = ('-std=c++17', '-O1', '-g1', '-fno-strict-aliasing', '-Wall', '-Wextra', '-Werror',
         '-Wno-unknown-pragmas', '-fsanitize=address,undefined,float-cast-overflow',
         '-fno-sanitize-recover=all')


class EmulatorBuild:
    """Compiles while other tests run.

    The compilers are niced, so that they delay the tests as little as possible. Of the processes of
    one test run the first to start compiles, and the others wait for its program. Objects are kept
    in .build/emulator, one for each state of a source and of all headers.
    """

    def __init__(self) -> None:
        self.compiler = os.environ.get('CXX') or 'g++'
        self.folder = ROOT / '.build' / 'emulator'
        # all but the bindings, which know torch
        kernels = sorted(path for path in (CSRC / 'cuda').rglob('*.cu')
                         if not path.name.endswith('_cuda.cu'))
        # the largest first: a core that is idle at the end costs nothing
        self.units = sorted([*EMULATOR.glob('*.cpp'), *CSRC.glob('*_plan.cpp'), *kernels],
                            key=lambda path: ('window' not in path.name, path.name))
        common = hashlib.sha256(' '.join((self.compiler, *FLAGS)).encode())
        for path in sorted({*CSRC.glob('*.h'), *(CSRC / 'cuda').rglob('*.*h'),
                            *EMULATOR.glob('*.h')}):
            common.update(path.read_bytes())
        whole = common.copy()
        self.objects: dict[Path, Path] = {}
        for unit in self.units:
            own = common.copy()
            for digest in (own, whole):
                digest.update(unit.read_bytes())
            self.objects[unit] = self.folder / f'{unit.name}-{own.hexdigest()[:16]}.o'
        self.program = self.folder / f'emulator-{whole.hexdigest()[:16]}'
        self.running: set[subprocess.Popen] = set()
        self.pool = ThreadPoolExecutor(os.cpu_count())
        self.linked: Optional[Future] = None
        self.all_objects = False

    def start(self, all_objects: bool = False) -> None:
        """`all_objects`: also those of a program that is there."""
        self.all_objects = all_objects
        if self.is_complete() or shutil.which(self.compiler) is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = (self.folder / 'lock').open('w')
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.compile_all()

    def is_complete(self) -> bool:
        return self.program.exists() and (
            not self.all_objects or all(compiled.exists() for compiled in self.objects.values()))

    def compile_all(self) -> None:
        objects = [self.pool.submit(self.compile, unit) for unit in self.units
                   if not self.objects[unit].exists()]
        self.linked = self.pool.submit(self.link, objects)  # starts when all of them have started

    def compile(self, unit: Path) -> None:
        compiled = self.objects[unit]
        self.run(compiled, '-I', str(EMULATOR), '-x', 'c++', '-c', str(unit))
        for old in self.folder.glob(f'{unit.name}-*.o'):
            if old != compiled:
                old.unlink(missing_ok=True)

    def run(self, output: Path, *arguments: str) -> None:
        """Runs the compiler; `output` is whole at every moment: another run may read it."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            made = f'{folder}/{output.name}'
            process = subprocess.Popen(['nice', self.compiler, *FLAGS, *arguments, '-o', made],
                                       stderr=subprocess.PIPE, text=True)
            self.running.add(process)
            errors = process.communicate()[1]
            self.running.remove(process)
            if process.returncode != 0:
                raise RuntimeError(f'{self.compiler} {" ".join(arguments)} failed\n'
                                   f'{errors[-4000:]}')
            os.replace(made, output)

    def link(self, objects: list[Future]) -> None:
        try:
            for compiled in objects:
                compiled.result()
            if not self.program.exists():
                self.run(self.program, *map(str, self.objects.values()))
            for old in self.folder.glob('emulator-*'):
                if old != self.program:
                    old.unlink(missing_ok=True)
        finally:
            fcntl.flock(self.lock, fcntl.LOCK_UN)

    def finish(self) -> Path:
        """Waits for the program; raises what the compiler said."""
        if self.linked is None and not self.is_complete():
            fcntl.flock(self.lock, fcntl.LOCK_EX)  # as long as another process compiles
            if not self.is_complete():  # it was stopped, or failed
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
        if hasattr(self, 'lock'):
            self.lock.close()
