# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""For all tests: the option --slow; random states and MMEngine's named objects that no test leaves."""

from __future__ import annotations

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
