# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The check of the CUDA kernels, with the CPU operator and with faulty ones in their place."""

from __future__ import annotations

import json
import subprocess

import pytest
import torch

from mmdcnv4.ops import dcnv4, kernel_check


def on_cpu(case, tensors):
    return kernel_check.gradients(dcnv4, tensors, groups=case.size[3], **case.geometry)


def swapped_axes(case, tensors):
    packed = tensors[1].clone()
    points = 3 ** 2 - case.geometry.get('remove_center', False)
    used = packed[..., :case.size[3] * 3 * points].unflatten(-1, (case.size[3], -1))
    used[..., :2 * points] = used[..., :2 * points].unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return on_cpu(case, (tensors[0], packed, tensors[2]))


def one_rounding_more(case, tensors):
    """Masks in the precision of the result, as if half of the split weights were dropped."""
    output, *gradients = on_cpu(case, tensors)
    wide = kernel_check.gradients(dcnv4, tuple(t.double() for t in tensors), groups=case.size[3],
                                  **case.geometry)[0]
    noise = 1 + 2.0**-9 * (2 * kernel_check.noise(wide.numel(), 9).view(wide.shape).abs() - 1)
    return ((wide * noise).to(output.dtype), *gradients)


def dropped_tail(case, tensors):
    output, grad_value, grad_packed = on_cpu(case, tensors)
    grad_value[-1, -1, -1] = 0
    return output, grad_value, grad_packed


def leaking_nan(case, tensors):
    output, *gradients = on_cpu(case, tensors)
    if case.with_nan:
        output.view(-1)[output.isnan().logical_not().flatten().nonzero()[0]] = torch.nan
    return (output, *gradients)


def one_part(number):
    """Case -> results where `number`, of value, masks and grad_output, is rounded to TF32: in every
    product that has it, its second part is missing."""
    def compute(case, tensors):
        tensors = [tensor.clone() for tensor in tensors]
        part = tensors[number]
        if number == 1:
            points = 3 ** 2 - case.geometry.get('remove_center', False)
            part = part[..., :case.size[3] * 3 * points].unflatten(-1, (case.size[3], -1))
            part = part[..., 2 * points:]
        bits = part.contiguous().view(torch.int32)
        part.copy_((bits + 0x1000 & -0x2000).view(torch.float32))
        return on_cpu(case, tensors)
    return compute


@pytest.mark.parametrize('family', kernel_check.families())
def test_right_kernels_pass(family):
    rows = kernel_check.run_family(family, on_cpu)
    assert kernel_check.is_good(rows) and rows[-1]['last']


@pytest.mark.parametrize('family', ['direct f32', 'window D=32 f16', 'window D=16 bf16',
                                    'window D=32 f32'])
@pytest.mark.parametrize('fault', [swapped_axes, dropped_tail, leaking_nan])
def test_a_fault_is_seen(family, fault):
    assert not kernel_check.is_good(kernel_check.run_family(family, fault))


def test_one_rounding_more_of_bfloat16_is_seen():
    assert not kernel_check.is_good(kernel_check.run_family('window D=32 bf16', one_rounding_more))


@pytest.mark.parametrize('depth', [16, 32])
@pytest.mark.parametrize('number', [0, 1, 2])
def test_a_missing_part_of_float32_is_seen(depth, number):
    """In each result that it has a share in."""
    compute = one_part(number)
    rows = kernel_check.run_family(f'window D={depth} f32', compute)
    shares = [('output', 'grad_offset_mask'), ('output', 'grad_value', 'grad_offset_mask'),
              ('grad_value', 'grad_offset_mask')][number]
    for row in rows:
        assert row['ok'] == (row['result'] not in shares), row
        assert row['ok'] or row['error'] > 8 * row['allowed'], row


def test_results_that_vary_are_seen_where_they_must_not():
    count = iter(range(100))

    def varying(case, tensors):
        output, grad_value, grad_packed = on_cpu(case, tensors)
        return output, grad_value * (1 + next(count) % 2 * 2**-22), grad_packed
    assert kernel_check.is_good(kernel_check.run_family('direct f32', varying))
    assert not kernel_check.is_good(kernel_check.run_family('deterministic f32', varying))


def test_a_crash_costs_one_family(monkeypatch):
    """The child dies in 'b', is started again for 'c' and 'd', and hangs in 'd'."""
    def line(family, **more):
        return json.dumps(dict(family=family, case='x', result='output', error=0.0, allowed=1.0,
                               ok=True, **more)) + '\n'

    def run(command, **options):
        names = command[3:]
        if names[0] == 'a':
            output = line('a') + line('a', last=True) + line('b')
            return subprocess.CompletedProcess(command, -6, output, 'illegal memory access')
        assert names == ['c', 'd']
        output = (line('c', last=True)).encode()
        raise subprocess.TimeoutExpired(command, 1, output=output)
    monkeypatch.setattr(subprocess, 'run', run)
    results = kernel_check.run_apart(['a', 'b', 'c', 'd'], seconds=5)
    assert {name: kernel_check.is_good(rows) for name, rows in results.items()} == dict(
        a=True, b=False, c=True, d=False)
    text = '\n'.join(kernel_check.table(results))
    assert 'illegal memory access' in text and 'stopped: 5 s are over' in text


def test_without_a_gpu_nothing_is_checked(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    assert kernel_check.check_and_remember() == 1
    assert 'there is nothing to check: torch' in capsys.readouterr().err
