# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""For all tests: the option --slow; no test leaves a random state or a named object of MMEngine."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Iterator

import pytest

from mmdcnv4.testing import fixed_seed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption('--slow', action='store_true', help='run the tests marked slow as well')


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption('--slow'):
        return
    for item in items:
        if 'slow' in item.keywords:
            item.add_marker(pytest.mark.skip(reason='slow: needs --slow'))


@pytest.fixture(scope='session', autouse=True)
def _metafiles_are_read_once() -> Iterator[None]:
    """For every `mmdet::...` that a config inherits, MMEngine parses all metafiles of that package
    and loads the list of installed packages anew: 0.5 s, a thousand times in these tests."""
    if importlib.util.find_spec('mmengine') is None:
        yield
        return
    from mmengine.config import config, utils
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, 'load', functools.cache(utils.load))
        patch.setattr(config, 'is_installed', functools.cache(config.is_installed))
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
    for part, kind in (('visualization', 'Visualizer'), ('logging', 'MMLogger'),
                       ('logging', 'MessageHub'), ('registry', 'DefaultScope')):
        module = sys.modules.get(f'mmengine.{part}')  # a test may have imported a part alone
        if module is not None:
            getattr(module, kind)._instance_dict.clear()
