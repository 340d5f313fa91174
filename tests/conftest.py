# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""For all tests: options; no test leaves random states or named objects of MMEngine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache

import pytest

from mmdcnv4.testing import fixed_seed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--slow', action='store_true', help='run the tests marked slow as well')
    parser.addoption('--schedules', default='', metavar='NAMES',
                     help='of the emulated CUDA threads, separated by commas, or all: each test '
                          'with each of them; otherwise each test has one, in rotation')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption('--slow'):
        return
    for item in items:
        if 'slow' in item.keywords:
            item.add_marker(pytest.mark.skip(reason='slow: needs --slow'))


@pytest.fixture(scope='session', autouse=True)
def _index_files_are_read_once() -> Iterator[None]:
    """MMEngine reads the hundred index files of a library for each config that inherits from it."""
    try:
        from mmengine.config import utils
    except ImportError:  # the operator's own tests run without the mm packages
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, 'load', cache(utils.load))
        yield


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    with fixed_seed():
        yield


@pytest.fixture(autouse=True)
def _no_named_objects_left() -> Iterator[None]:
    """MMEngine keeps visualizers, loggers and message hubs of one process by name, so that a test
    that runs a tool would otherwise get the visualizer of another library from an earlier test."""
    yield
    if 'mmengine.utils.manager' in sys.modules:
        kinds = [sys.modules['mmengine.utils.manager'].ManagerMixin]
        while kinds:
            kind = kinds.pop()
            kinds.extend(type.__subclasses__(kind))
            getattr(kind, '_instance_dict', {}).clear()
