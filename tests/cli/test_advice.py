# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What a message advises, its reader can type: in a program of ours, in others, and in Python."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / 'mmdcnv4'
OPTION = re.compile(r'(?<![\w-])--[a-z][\w-]*')
# Texts beside an option that say which program has it. Those of OpenMMLab have --cfg-options, too,
# and a reader without any can change the config.
PROGRAMS = ('in the config or with --cfg-options', 'pip install', 'mmdcnv4.info', '.py')
ALLOWED = {('engine/hooks/run_checks.py', '--allow-mismatch'): 'when our tools have added the hook'}


def texts(source: str) -> Iterator[str]:
    """The strings of a program as they are printed, without its docstrings."""
    tree = ast.parse(source)
    passed = {id(node.body[0].value) for node in ast.walk(tree)
              if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
              and ast.get_docstring(node) is not None}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            passed.update(map(id, node.values))
            yield ''.join(part.value if isinstance(part, ast.Constant) else '{}'
                          for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) \
                and id(node) not in passed:
            yield node.value


def misleading(source: str) -> list[str]:
    """Texts that name an option, and not whose."""
    return [text for text in texts(source)
            if OPTION.search(text) and not any(program in text for program in PROGRAMS)]


def test_messages_of_the_library_do_not_presume_a_program() -> None:
    """`cli` is that of our programs, `info` is one."""
    found = {(path.relative_to(PACKAGE).as_posix(), text)
             for path in PACKAGE.rglob('*.py') if path.name != 'info.py'
             and 'cli' not in path.relative_to(PACKAGE).parts
             and '.mim' not in path.relative_to(PACKAGE).parts
             for text in misleading(path.read_text())}
    assert found == set(ALLOWED)


@pytest.mark.parametrize('source, found', [
    ('def f():\n    """See --resume."""\n    raise ValueError(f"go on {1} with "\n"--resume")',
     ['go on {} with --resume']),
    ('x = "set it in the config or with --cfg-options a=1"', []),
    ('x = "--ignore-index of quick_start.py"', []), ('x = "a -- b", "a--b", "x--y"', [])])
def test_the_check_itself(source: str, found: list[str]) -> None:
    assert misleading(source) == found
