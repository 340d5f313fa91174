# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What a module does when it is imported, without the seconds that a new process takes."""

from __future__ import annotations

import importlib.util
from types import ModuleType


def execute_again(module: ModuleType) -> ModuleType:
    """A second copy of a module; the one that everybody uses stays as it is."""
    spec = importlib.util.spec_from_file_location(f'{module.__name__}_again', module.__file__)
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy
