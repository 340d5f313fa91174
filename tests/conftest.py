# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""For all tests: the option --slow, and random states that no test leaves changed."""

from __future__ import annotations

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
