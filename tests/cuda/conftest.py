# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The emulator of the CUDA kernels and the schedules of its threads; kernels on a GPU."""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Optional

import pytest
import torch

from helpers.emulate import SCHEDULES, Emulator
from helpers.emulator_build import EmulatorBuild
from helpers.gpu_cases import set_fast

_build: Optional[EmulatorBuild] = None


def pytest_collection_finish(session: pytest.Session) -> None:
    global _build
    if not session.config.option.collectonly and any(
            'emulator_program' in getattr(item, 'fixturenames', ()) for item in session.items):
        _build = EmulatorBuild()
        if 'MMDCNV4_EMULATOR' not in os.environ:
            _build.start()


def pytest_unconfigure() -> None:
    if _build is not None:
        _build.stop()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = metafunc.config.getoption('--schedules')
    has_own = any('schedule' in mark.args[0] for mark in
                  metafunc.definition.iter_markers('parametrize'))
    if 'schedule' in metafunc.fixturenames and names and not has_own:
        metafunc.parametrize('schedule', SCHEDULES if names == 'all' else names.split(','),
                             indirect=True)


@pytest.fixture(scope='session')
def emulator_program() -> Path:
    """The program, see tests/cuda/emulator/main.cpp; MMDCNV4_EMULATOR names another one."""
    if 'MMDCNV4_EMULATOR' in os.environ:
        return Path(os.environ['MMDCNV4_EMULATOR'])
    assert _build is not None
    if shutil.which(_build.compiler) is None:
        pytest.skip(f'the emulator of the CUDA kernels needs a C++ compiler ({_build.compiler})')
    return _build.finish()


@pytest.fixture
def schedule(request: pytest.FixtureRequest) -> str:
    """Of the tests that want none of their own each gets one, from its name; or with all that
    --schedules lists."""
    turn = zlib.crc32(request.node.nodeid.encode()) % len(SCHEDULES)
    chosen = getattr(request, 'param', [*SCHEDULES][turn])
    print(f'schedule of the threads: {chosen}')  # pytest shows it with a failure
    return chosen


@pytest.fixture
def emulator(emulator_program: Path, schedule: str) -> Emulator:
    """The emulator of the CUDA kernels."""
    return Emulator(emulator_program, schedule)


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
