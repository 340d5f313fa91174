# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The emulator of the CUDA kernels, built once per state of their sources; kernels on a GPU."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from helpers.gpu_cases import set_fast

ROOT = Path(__file__).parents[2]
CSRC, EMULATOR = ROOT / 'csrc', Path(__file__).parent / 'emulator'
FLAGS = ('-std=c++17', '-O1', '-g1', '-fno-strict-aliasing', '-Wall', '-Wextra', '-Werror',
         '-Wno-unknown-pragmas', '-fsanitize=address,undefined,float-cast-overflow',
         '-fno-sanitize-recover=all')


def run(command: list[str], **options: object) -> subprocess.CompletedProcess:
    result = subprocess.run(command, capture_output=True, text=True, **options)
    if result.returncode != 0:
        pytest.fail(f'{" ".join(map(str, command[:3]))} … failed\n{result.stderr[-4000:]}',
                    pytrace=False)
    return result


@pytest.fixture(scope='session')
def emulator(request: pytest.FixtureRequest) -> Path:
    """Path of the program; see tests/cuda/emulator/main.cpp."""
    compiler = os.environ.get('CXX', 'g++')
    if shutil.which(compiler) is None:
        pytest.skip(f'the emulator of the CUDA kernels needs a C++ compiler ({compiler})')
    # all but the bindings, which know torch
    kernels = sorted(path for path in (CSRC / 'cuda').rglob('*.cu')
                     if not path.name.endswith('_cuda.cu'))
    units = [*sorted(EMULATOR.glob('*.cpp')), CSRC / 'launch_plan.cpp', *kernels]
    headers = [*CSRC.glob('*.h'), *(CSRC / 'cuda').rglob('*.*h'), *EMULATOR.glob('*.h')]
    digest = hashlib.sha256(' '.join((compiler, *FLAGS)).encode())
    for path in sorted({*units, *headers}):
        digest.update(path.read_bytes())
    folder = Path(request.config.cache.mkdir('cuda_emulator'))
    program = folder / f'emulator-{digest.hexdigest()[:16]}'
    if not program.exists():
        for old in folder.iterdir():
            old.unlink()
        objects = [folder / f'{path.name}.o' for path in units]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda path, compiled: run(
                [compiler, *FLAGS, '-I', str(EMULATOR), '-x', 'c++', '-c', str(path), '-o',
                 str(compiled)]), units, objects))
        run([compiler, *FLAGS, *map(str, objects), '-o', str(program)])
    return program


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
