# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A limit on length. What is longer stands in the allow-list below, with a reason."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINE = 100
FUNCTION, CONSTRUCTOR, PARAMETERS = 60, 90, 12
FILE = {'.py': 500, '.cpp': 400, '.h': 400, '.cu': 400, '.cuh': 400}
LEAF_CONFIG = 100

# (path, name) -> reason; an entry that is not needed any more fails the test
ALLOWED = {
    ('mmdcnv4/ops/module.py', 'DCNv4.__init__', 'parameters'):
        'the official argument names, and four of ours',
    ('mmdcnv4/models/layers/dcnv4_conv.py', 'DCNv4Conv2d.__init__', 'parameters'):
        'eight arguments of a convolution, as mmcv passes them, and the options of DCNv4',
    ('mmdcnv4/models/backbones/flash_intern_image.py', 'FlashInternImage.__init__', 'parameters'):
        'the official argument names of the backbone',
}


def python_files():
    for folder in ('mmdcnv4', 'tools', 'tests', 'dev', 'benchmarks'):
        yield from sorted((ROOT / folder).rglob('*.py'))
    yield ROOT / 'setup.py'


def source_files():
    yield from python_files()
    yield from sorted((ROOT / 'configs').rglob('*.py'))
    yield from sorted(path for path in (ROOT / 'csrc').rglob('*') if path.suffix in FILE)


def functions(tree, prefix=''):
    """(qualified name, node) of every function, also of those inside classes and functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            name = prefix + node.name
            if not isinstance(node, ast.ClassDef):
                yield name, node
            yield from functions(node, name + '.')
        else:
            yield from functions(node, prefix)


def body_length(node):
    """Lines of a function without its docstring, which may be as long as it needs to be."""
    length = node.end_lineno - node.lineno + 1
    first = node.body[0]
    if ast.get_docstring(node) is not None:
        length -= first.end_lineno - first.lineno + 1
    return length


def parameter_count(node):
    arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([argument for argument in arguments if argument.arg not in ('self', 'cls')])


def excesses(path, text=None):
    """(name, kind, text) of everything too long in a Python file."""
    text = path.read_text() if text is None else text
    for name, node in functions(ast.parse(text)):
        limit = CONSTRUCTOR if node.name == '__init__' else FUNCTION
        if body_length(node) > limit:
            yield name, 'lines', f'{body_length(node)} lines, at most {limit}'
        if parameter_count(node) > PARAMETERS:
            yield name, 'parameters', f'{parameter_count(node)} parameters, at most {PARAMETERS}'


def test_functions():
    found = {}
    for path in python_files():
        for name, kind, text in excesses(path):
            found[path.relative_to(ROOT).as_posix(), name, kind] = text
    assert {key: text for key, text in found.items() if key not in ALLOWED} == {}
    assert [key for key in ALLOWED if key not in found] == [], 'no longer needed'


def test_files():
    too_long = {}
    for path in source_files():
        limit = FILE[path.suffix]
        if 'configs' in path.relative_to(ROOT).parts[:1] and '_base_' not in path.parts:
            limit = LEAF_CONFIG
        count = len(path.read_text().splitlines())
        if count > limit:
            too_long[path.relative_to(ROOT).as_posix()] = f'{count} lines, at most {limit}'
    assert too_long == {}


def test_lines():
    too_long = [f'{path.relative_to(ROOT)}:{number}' for path in source_files()
                for number, line in enumerate(path.read_text().splitlines(), 1)
                if len(line) > LINE]
    assert too_long == []


@pytest.mark.parametrize('text, kinds', [
    ('def f():\n' + '    x = 1\n' * 59, []), ('def f():\n' + '    x = 1\n' * 60, ['lines']),
    ('def f():\n    """' + 'a\n' * 70 + '    """\n    return 1\n', []),
    ('class A:\n    def __init__(self):\n' + '        x = 1\n' * 89, []),
    ('class A:\n    def __init__(self):\n' + '        x = 1\n' * 90, ['lines']),
    ('def f(a, b, c, d, e, f, g, h, i, j, k, *, l): ...', []),
    ('def f(a, b, c, d, e, f, g, h, i, j, k, *, l, m): ...', ['parameters'])])
def test_the_check_itself(text, kinds):
    assert [kind for _, kind, _ in excesses(None, text)] == kinds
