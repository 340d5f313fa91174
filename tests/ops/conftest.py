# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Every set of kernels that this machine can run, as a parameter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mmdcnv4.ops import _extension
from mmdcnv4.testing import cpu_instruction_set

INSTRUCTION_SETS = ('generic', 'avx2', 'avx512')


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request: pytest.FixtureRequest, native: None) -> Iterator[str]:
    """Runs the test with the kernels of one instruction set."""
    if request.param not in _extension.build_info['cpu']['supported']:
        pytest.skip(f'this processor has no {request.param}')
    with cpu_instruction_set(request.param):
        yield request.param


@pytest.fixture
def native() -> None:
    """For tests that need the compiled kernels."""
    if not _extension.is_available:
        pytest.skip(f'no compiled kernels: {_extension.missing_reason}')
