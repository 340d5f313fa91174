# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The two forms of the contract, `contract.py` and `dcnv4_check.cpp`, say the same.

Three comparisons: the sentences in the two sources, the answers to the table of bad calls (also
those of the fake kernels), and the answers to calls made of the edges of every range.
"""

from __future__ import annotations

import ast
import inspect
import random
import re
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from helpers.bad_calls import (
    BOTH,
    GRAD_OUTPUT,
    arguments,
    assert_raises,
    backward,
    by_torch_ops,
    names,
)
from mmdcnv4.ops import contract
from mmdcnv4.ops.contract import MAX_KERNEL, MAX_SIDE, check_tensors, make_geometry

CHECKS = Path(__file__).parents[2] / 'csrc' / 'dcnv4_check.cpp'
# The dispatcher has converted or refused these before C++ sees them …
ONLY_PYTHON = {('TypeError', '* must be an int or a pair (height, width)'),
               ('TypeError', '* must be an int or a pair (height, width) of ints'),
               ('TypeError', 'groups must be an int'),
               ('TypeError', 'offset_scale must be a number'),
               ('TypeError', '* must be True or False'),
               ('TypeError', '* must be a torch.Tensor'),
               ('TypeError', '* must be a dense tensor')}
# … and lets a list of another length pass.
ONLY_CPP = {('ValueError', '* must be a pair (height, width)')}


def rule(error, text):
    """What a message demands: without the name of the package and without what it got."""
    return error, re.sub(r'^dcnv4: |,? got .*$', '', text, flags=re.DOTALL)


def python_rules(source):
    """(exception, rule) of every `raise` with a message; '*' stands for what is filled in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Raise) and node.exc.args:
            text = node.exc.args[0]
            parts = text.values if isinstance(text, ast.JoinedStr) else [text]
            yield rule(node.exc.func.id, ''.join(
                part.value if isinstance(part, ast.Constant) else '*' for part in parts))


def cpp_rules(source):
    """The same of every TORCH_CHECK."""
    for kind, body in re.findall(r'TORCH_CHECK_(VALUE|TYPE)\((.*?)\);', source, re.DOTALL):
        message = body[body.index('"dcnv4: '):]
        # string literals beside each other are one string, everything else is filled in
        parts = re.findall(r'"((?:[^"\\]|\\.)*)"|([^",\s][^",]*)', message)
        yield rule(f'{kind.capitalize()}Error', ''.join(
            literal if not filled else '*' for literal, filled in parts))


def rules():
    return (set(python_rules(inspect.getsource(contract))), set(cpp_rules(CHECKS.read_text())))


def test_every_rule_is_in_both_sources():
    python, cpp = rules()
    assert python - ONLY_PYTHON == cpp - ONLY_CPP
    assert python >= ONLY_PYTHON and cpp >= ONLY_CPP and len(python & cpp) >= 20


def test_a_rule_in_one_source_only_is_seen():
    """The comparison itself: a rule that one side lacks, or words otherwise, is a difference."""
    source = 'def f():\n    raise ValueError(f"dcnv4: x must be <= {LIMIT}, got {x}")\n'
    checks = 'TORCH_CHECK_VALUE(x <= kLimit, "dcnv4: x must "\n   "be <= ", kLimit, ", got ", x);'
    assert set(python_rules(source)) == set(cpp_rules(checks)) == {('ValueError', 'x must be <= *')}
    for other in (checks.replace('VALUE', 'TYPE'), checks.replace('<= ",', '< ",'), ''):
        assert set(python_rules(source)) != set(cpp_rules(other))


def test_every_rule_is_broken_by_a_call_of_the_table():
    messages = {}
    for number, (_, changes, *_) in enumerate(BOTH):
        with pytest.raises((TypeError, ValueError)) as caught:
            check(**arguments(changes))
        messages[number] = rule(caught.type.__name__, str(caught.value))
    for changes, *_ in GRAD_OUTPUT:
        with pytest.raises((TypeError, ValueError)) as caught:
            backward(**arguments(dict(grad_output=changes)))
        messages[len(messages)] = rule(caught.type.__name__, str(caught.value))
    python, cpp = rules()
    for error, text in python & cpp:
        pattern = re.escape(text).replace(r'\*', '.*')
        assert any(kind == error and re.fullmatch(pattern.replace('groups.*3K', r'groups \* 3K'),
                                                  message, re.DOTALL)
                   for kind, message in messages.values()), f'no bad call breaks: {text}'


def check(value, offset_mask, **scalars):
    """The Python form of the contract."""
    return check_tensors(value, offset_mask, make_geometry(**scalars))


def in_fake_mode(function):
    def call(value, offset_mask, grad_output=None, **scalars):
        with FakeTensorMode() as mode:
            tensors = [mode.from_tensor(tensor) for tensor in (value, offset_mask)]
            if grad_output is not None:
                scalars['grad_output'] = mode.from_tensor(grad_output)
            return function(*tensors, **scalars)

    return call


@pytest.mark.parametrize('argument, changes, exception, message', BOTH, ids=names(BOTH))
def test_fake_kernels_refuse_the_same(native, argument, changes, exception, message):
    for function in (by_torch_ops, backward):
        assert_raises(in_fake_mode(function), changes, argument, exception, message)


@pytest.mark.parametrize('grad_output, exception, message', GRAD_OUTPUT)
def test_fake_kernels_refuse_the_same_gradients(native, grad_output, exception, message):
    assert_raises(in_fake_mode(backward), dict(grad_output=grad_output), 'grad_output', exception,
                  message)


EDGES = dict(
    kernel_size=[-1, 0, 1, 2, 3, MAX_KERNEL, MAX_KERNEL + 1, 2**31, 2**62],
    stride=[-1, 0, 1, 2, MAX_SIDE, MAX_SIDE + 1, 2**32 + 1, 2**63 - 1],
    padding=[-1, 0, 1, MAX_SIDE, MAX_SIDE + 1, 2**32],
    dilation=[-2**63, 0, 1, 2, MAX_SIDE, MAX_SIDE + 1],
    groups=[-1, 0, 1, 2, 3, MAX_SIDE, MAX_SIDE + 1, 2**43],
    offset_scale=[0.0, -2.5, float('inf'), float('nan')], remove_center=[False, True],
    softmax=[False, True])
SIDES = [0, 1, 2, 5, MAX_SIDE, MAX_SIDE + 1]
CHANNELS = [0, 1, 6, MAX_SIDE, 2**43]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64]


def edge_call(draw):
    """A call near the good one; its tensors have no elements, whatever their sides."""
    scalars = dict(kernel_size=[3, 3], groups=2, stride=[1, 1], padding=[1, 1], dilation=[1, 1],
                   offset_scale=1.0, remove_center=False, softmax=False)
    height, width, channels = 5, 7, 6
    for name in draw.sample(sorted(EDGES), draw.randint(0, 3)):
        scalars[name] = ([draw.choice(EDGES[name]) for _ in range(2)]
                         if isinstance(scalars[name], list) else draw.choice(EDGES[name]))
    if draw.random() < 0.5:
        height, width = draw.choice(SIDES), draw.choice(SIDES)
    if draw.random() < 0.3:
        channels = draw.choice(CHANNELS)
    dtype = draw.choice(DTYPES) if draw.random() < 0.3 else torch.float32
    mask_dtype = draw.choice(DTYPES) if draw.random() < 0.3 else dtype
    value = torch.zeros(0, 1, 1, 1, dtype=dtype).expand(0, height, width, channels)
    shape = (0, 5, 7, 56)
    try:
        geometry = make_geometry(**scalars)
        shape = (0, *contract.output_size(height, width, geometry),
                 contract.offset_mask_channels(geometry.groups, geometry.points))
    except (TypeError, ValueError):
        pass
    if draw.random() < 0.1:
        shape = shape[:3] + (shape[3] + 8,)
    mask = torch.zeros(0, 1, 1, 1, dtype=mask_dtype).expand(shape)
    return dict(value=value, offset_mask=mask, **scalars)


def answer(function, call):
    """'accepted', or the exception, with the spellings of the two languages made the same."""
    try:
        function(**call)
    except (TypeError, ValueError) as error:
        text = re.sub(r'[()\[\]]|torch\.', '', str(error))
        for python, cpp in (('float64', 'Double'), ('float32', 'Float'), ('bfloat16', 'BFloat16'),
                            ('float16', 'Half'), ('int64', 'Long')):
            # "value must be float64, float32 …" is a part of the sentence in both
            text = re.sub(rf'\b{cpp}\b', python, text)
        return type(error).__name__, text
    return 'accepted'


def cpp_check(value, offset_mask, **scalars):
    """The C++ form alone: no output is made, whose size may exceed what torch can say."""
    try:
        torch.ops.mmdcnv4._dcnv4_launch_plan(value, offset_mask, *scalars.values(), False, 132)
    except (RuntimeError, ValueError) as error:  # the limits of a plan come after the contract
        if not re.search('on a GPU|on this device', str(error)):
            raise


def test_both_answer_alike_at_the_edges_of_every_range(native):
    draw = random.Random(0)
    answers = []
    for _ in range(3000):
        call = edge_call(draw)
        expected = answer(check, call)
        actual = answer(cpp_check, call)
        assert actual == expected, {name: getattr(item, 'shape', item)
                                    for name, item in call.items()}
        answers.append(expected)
    assert 300 < answers.count('accepted') < 2700
    assert len({text[1][:30] for text in answers if text != 'accepted'}) >= 12
