# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""A limit on length. What is longer stands in the allow-list below, with a reason."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINE = 100
FUNCTION, CONSTRUCTOR, PARAMETERS = 60, 90, 12
CPP_FUNCTION = 60  # lines from `template` or the type to the closing brace, without comments
FILE = {'.py': 500, '.cpp': 400, '.h': 400, '.inl': 400, '.cu': 400, '.cuh': 400}
LEAF_CONFIG = 100

# (path, name) -> reason; an entry that is not needed any more fails the test
ALLOWED = {
    ('mmdcnv4/ops/module.py', 'DCNv4.__init__', 'parameters'):
        'the official argument names, and four of ours',
    ('mmdcnv4/models/layers/dcnv4_conv.py', 'DCNv4Conv2d.__init__', 'parameters'):
        'eight arguments of a convolution, as mmcv passes them, and the options of DCNv4',
    ('mmdcnv4/models/backbones/dynamic_mobile_former.py', 'DynamicMobileFormer.__init__',
     'parameters'): 'sizes of the family, and the arguments that all backbones have',
    ('mmdcnv4/models/backbones/flash_intern_image.py', 'FlashInternImage.__init__', 'parameters'):
        'the official argument names of the backbone',
    ('mmdcnv4/bevformer_v2/models/perspective_head.py', 'PerspectiveHead.__init__', 'parameters'):
        'names and sizes of the classes beside the options of a head',
    ('mmdcnv4/bevformer_v2/models/detector.py', 'BEVFormerV2.__init__', 'parameters'):
        'six parts of the model, and what every detector has',
    ('mmdcnv4/models/backbones/dat.py', 'DAT.__init__', 'parameters'):
        'sizes and options of three families, and what every backbone has',
    ('mmdcnv4/models/backbones/convnext_dcnv4.py', 'ConvNeXtDCNv4.__init__', 'parameters'):
        'options of ConvNeXt and of DCNv4, and what every backbone has',
    ('mmdcnv4/models/backbones/vit_dcnv4.py', 'ViTDCNv4.__init__', 'parameters'):
        'options of a ViT and of DCNv4, and what every backbone has',
}

# file name, function -> reason
ALLOWED_CPP = {
    ('dcnv4_backward.cuh', 'dcnv4_backward_kernel'):
        'the steps are functions; what is left is their order and the registers they share',
    ('dcnv4_window_grad_value.cuh', 'dcnv4_window_grad_value_kernel'): 'the same',
    ('dcnv4_window_forward.cuh', 'dcnv4_window_forward_kernel'): 'the same',
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


# what C++ has beside code
NO_CODE = re.compile('|'.join([
    r'R"(\w*)\(.*?\)\1"', r'//[^\n]*', r'/\*.*?\*/', r'"(?:\\.|[^"\\\n])*"',
    r"'(?:\\.|[^'\\\n])+'", r'^[ \t]*#(?:[^\n]*\\\n)*[^\n]*']), re.DOTALL | re.MULTILINE)
CONTAINER = re.compile(r'\b(namespace|class|struct|union|enum|extern)\b')
NOT_A_NAME = {'__launch_bounds__', '__attribute__', 'alignas', 'decltype', 'noexcept', 'if', 'for'}


def only_code(text):
    """C++ with all else blanked out, preprocessor lines too; lines and columns stay."""
    return NO_CODE.sub(lambda match: re.sub(r'[^\n]', ' ', match[0]), text)


def head_name(head):
    """Name of what a head at namespace or class scope introduces; '' for a container."""
    head = re.sub(r'alignas\s*\([^)]*\)', '', head)
    depth, outer = 0, []
    for match in re.finditer(r'[()]|(operator\s*(?:\(\s*\)|[^\s\w(]+)|[\w:~]+)(?=\s*\()', head):
        if match[1] and depth == 0:
            outer.append(match[1])
        depth += dict([('(', 1), (')', -1)]).get(match[0], 0)
    if not outer and CONTAINER.search(head):
        return ''
    return next((name for name in outer if name not in NOT_A_NAME), head.split('=')[0].strip())


def cpp_blocks(text):
    """(name, lines) of everything in braces at namespace or class scope that is no container: a
    function with its head, or an initial value. Braces are matched, so nothing is passed over."""
    code = only_code(text)
    depth, inner, start = 0, None, 0  # inner: depth outside the block that is being measured
    for place, char in enumerate(code):
        if char == ';' and inner is None:
            start = place + 1
        elif char == '{':
            if inner is None and head_name(code[start:place]):
                inner = depth
            depth += 1
            start = place + 1 if inner is None else start
        elif char == '}':
            depth -= 1
            assert depth >= 0, f'line {code.count(chr(10), 0, place) + 1}: a brace too many'
            following = code[place + 1:].lstrip()[:1]
            if depth == inner and following not in (',', '{'):  # else: `: member{...}, ... {`
                block = re.sub(r'^\s*(?:(?:public|private|protected)\s*:\s*)*', '',
                               code[start:place + 1])
                yield head_name(block[:block.index('{')]), sum(map(bool, map(
                    str.strip, block.split('\n'))))
                inner = None
            start = place + 1 if inner is None else start
    assert depth == 0, 'a brace is not closed'


def cpp_files():
    return [path for folder in ('csrc', 'tests/cuda/emulator')
            for path in sorted((ROOT / folder).rglob('*')) if path.suffix in FILE]


def test_cpp_functions():
    found = {(path.name, name): f'{count} lines, at most {CPP_FUNCTION}' for path in cpp_files()
             for name, count in cpp_blocks(path.read_text()) if count > CPP_FUNCTION}
    assert {key: text for key, text in found.items() if key not in ALLOWED_CPP} == {}
    assert [key for key in ALLOWED_CPP if key not in found] == [], 'no longer needed'


@pytest.mark.parametrize('text, expected', [
    ('int f() { return 1; }', [('f', 1)]),
    ('namespace a {\nint f() {\n  if (x) { return 1; }\n}\n}', [('f', 3)]),
    ('template <typename T>\nT f(T a,\n    T b) {\n}', [('f', 4)]),
    ('struct A {\n public:\n  A(int b) : c{b}, d(b) {\n    e();\n  }\n  int c;\n};', [('A', 3)]),
    ('struct A { T operator()(T a) const {\n return a; } T operator+(T a) { return a; } };',
     [('operator()', 2), ('operator+', 1)]),
    ('// {\nconst char* s = "{"; /* { */\n#define X { \\\n {\nint f() {\n\n  // }\n}',
     [('f', 2)]),
    ('__global__ void __launch_bounds__(256) kernel(int a) {\n}', [('kernel', 2)]),
    ('struct alignas(16) Four { T x; }; enum E { kA, kB };', []),
    ('constexpr int kTable[] = {\n1,\n2};', [('constexpr int kTable[]', 3)]),
    ('auto c = R"({)"; char d = \'{\'; void g() {}', [('g', 1)])])
def test_the_cpp_count_itself(text, expected):
    assert list(cpp_blocks(text)) == expected


@pytest.mark.parametrize('text', ['int f() {', 'int f() { }}'])
def test_unmatched_braces_are_told(text):
    with pytest.raises(AssertionError, match='brace'):
        list(cpp_blocks(text))


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
