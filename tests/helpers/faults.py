# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Faults to put into a copy of a source, for programs that ask which tests see them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple


class Fault(NamedTuple):
    """In `file`, `right`, which occurs once, becomes `wrong`."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]  # that should turn red, the most likely ones first
    units: tuple[str, ...] = ()  # of a compiled language: sources that are compiled with it
    equivalent: str = ''  # why it makes no difference, if that is so

    def put_into(self, folder: Path) -> str:
        """Writes the fault into the file below `folder`; returns what the file was before."""
        path = folder / self.file
        before = path.read_text()
        if before.count(self.right) != 1:
            raise ValueError(f'{self.name}: its text must occur once in {self.file}, found '
                             f'{before.count(self.right)} times')
        path.write_text(before.replace(self.right, self.wrong))
        return before
