# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of multi-scale deformable attention, run on the CPU under ASan and UBSan."""

from __future__ import annotations

import json
import math

import pytest
import torch

from helpers.attention_cases import (
    DTYPES,
    F32,
    F64,
    SIZES,
    assert_accurate,
    exact,
    make_inputs,
)
from helpers.emulate import CODE, GPU, ONE_PROCESSOR, THREE, from_bytes, to_bytes
from mmdcnv4.ops import _extension, multi_scale_deformable_attention


def emulate(emulator, path, inputs, *, schedule=None, alignment=16, device=GPU,
            deterministic=False):
    """Output and gradients, grad_value rounded to the type of value; both plans, and what is added
    to grad_value. There are no copies in the background: where those would land at once, numbers
    are added one by one, as before sm_90, instead.
    """
    value, locations, weights, sizes, grad_output = inputs
    data = b''.join(map(to_bytes, (value, locations, weights, grad_output)))
    path.write_bytes(data)
    exponent = sum(max(-1100, math.floor(math.log2(t.double().nan_to_num(0, 0, 0).abs().max())) + 1)
                   for t in (grad_output, weights)) if deterministic else 0
    batch, queries, heads, levels, points = weights.shape
    numbers = [emulator.code(schedule), alignment, CODE[value.dtype], int(locations.dtype == F32),
               int(weights.dtype == F32), int(deterministic), 2.0**-exponent, *device, batch,
               queries, heads, value.shape[3], points, levels, *(n for size in sizes for n in size)]
    options = ['before_sm_90'] * (schedule or emulator.schedule).endswith('-at-once')
    *plans, added = json.loads(
        emulator('attention', f'{path} {" ".join(map(str, numbers))}\n', *options))
    rest = path.read_bytes()[len(data):]
    output, rest = from_bytes(rest, value.dtype, grad_output.shape)
    is_wide = deterministic or value.dtype == F64
    grad_value, rest = from_bytes(rest, F64 if is_wide else F32, value.shape)
    grad_locations, rest = from_bytes(rest, locations.dtype, locations.shape)
    grad_weights, rest = from_bytes(rest, weights.dtype, weights.shape)
    assert not rest
    return (output, grad_value.to(value.dtype), grad_locations, grad_weights), plans, added


def on_the_cpu(inputs):
    """Output and gradients by the CPU kernels, in the dtypes of the tensors."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs[:3]]
    output = multi_scale_deformable_attention(leaves[0], inputs.sizes, *leaves[1:],
                                              backend='native')
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs.grad_output)]


@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('name', SIZES)
def test_sizes(emulator, tmp_path, name, dtypes):
    inputs = make_inputs(name, DTYPES[dtypes])
    actual, *_ = emulate(emulator, tmp_path / 'call', inputs)
    assert_accurate(actual, inputs)


@pytest.mark.parametrize('name', ['odd', 'encoder', 'tiny-levels'])
@pytest.mark.skipif(not _extension.is_available, reason='no compiled kernels')
def test_equals_the_cpu_kernels(emulator, tmp_path, name):
    inputs = make_inputs(name, DTYPES['f64'])
    actual, *_ = emulate(emulator, tmp_path / 'call', inputs)
    for found, target in zip(actual, on_the_cpu(inputs)):
        torch.testing.assert_close(found, target, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize('order', THREE)
@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('dtypes', ['f32', 'bf16-f32'])
def test_orders_of_threads(emulator, tmp_path, order, deterministic, dtypes):
    """What is right in one order only is a race."""
    for name in ('encoder', 'many-points'):
        inputs = make_inputs(name, DTYPES[dtypes])
        actual, *_ = emulate(emulator, tmp_path / 'call', inputs, schedule=order,
                             device=ONE_PROCESSOR, deterministic=deterministic)
        assert_accurate(actual, inputs)


@pytest.mark.parametrize('dtypes, sectors', [('f32', 4), ('f16-f32', 8)])
@pytest.mark.parametrize('schedule', ['forward', 'forward-at-once'], indirect=True)
def test_reductions_fill_sectors(emulator, tmp_path, schedule, dtypes, sectors):
    """Of 32 bytes each: they are what a GPU's reductions wait for. 32 channels are four; half types
    have eight channels per thread, and fill half of each."""
    inputs = make_inputs('encoder', DTYPES[dtypes])
    actual, _, added = emulate(emulator, tmp_path / 'call', inputs)
    assert_accurate(actual, inputs)
    pixels, rest = divmod(added['numbers'], 32)
    assert pixels > 0 and rest == 0
    assert added['sectors'] <= pixels * sectors


@pytest.mark.parametrize('dtypes', ['f64', 'f32', 'f16-f32-f16', 'bf16'])
def test_deterministic(emulator, tmp_path, dtypes):
    """The same bits in any order of threads; channels in one step and in several."""
    for name in ('odd', 'crowded'):
        inputs = make_inputs(name, DTYPES[dtypes])
        results = [emulate(emulator, tmp_path / 'call', inputs, schedule=order,
                           deterministic=True)[0] for order in THREE]
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))
        assert_accurate(results[0], inputs)


@pytest.mark.parametrize('numbers', [1, 150, 1000])
def test_few_images_per_launch(emulator, tmp_path, numbers):
    """Where blocks, samples or pixels of all images are too many to be counted in 32 bits."""
    for deterministic in (False, True):
        inputs = make_inputs('tiny-levels', DTYPES['f32'])
        actual, plans, _ = emulate(emulator, tmp_path / 'call', inputs, device=(*GPU[:3], numbers),
                                   deterministic=deterministic)
        assert plans[1]['images'] == max(1, numbers // 144)  # 9 queries, 2 heads, 8 samples
        assert_accurate(actual, inputs)


@pytest.mark.parametrize('shared_bytes', [24 * 1024, 4 * 1024])
@pytest.mark.parametrize('name', ['encoder', 'many-points', 'tiny-levels', 'very-wide'])
def test_little_shared_memory(emulator, tmp_path, name, shared_bytes):
    inputs = make_inputs(name, DTYPES['f16'])
    actual, plans, _ = emulate(emulator, tmp_path / 'call', inputs,
                               device=(1, shared_bytes, *GPU[2:]))
    assert all(plan['shared_bytes'] <= shared_bytes for plan in plans)
    assert_accurate(actual, inputs)


@pytest.mark.parametrize('dtypes', ['f32', 'f16'])
def test_alignment(emulator, tmp_path, dtypes):
    inputs = make_inputs('encoder', DTYPES[dtypes])
    size = inputs.value.element_size()
    for alignment, vec in ((16, 16 // size), (8, 1), (size, 1)):
        actual, plans, _ = emulate(emulator, tmp_path / 'call', inputs, alignment=alignment)
        assert [plan['vec'] for plan in plans] == [vec, vec]
        assert_accurate(actual, inputs)


# ------------------------------------------------------------------------------- hostile inputs


@pytest.mark.hostile
@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf, 1e9, -1e9, 1e38])
def test_far_and_undefined_locations_count_as_zero(emulator, tmp_path, bad, deterministic):
    inputs = make_inputs('odd', DTYPES['f32'])
    hostile, quiet = inputs.locations.clone(), inputs.weights.clone()
    hostile[:, ::2, :, 1, 2, 0] = bad
    hostile[:, ::2, :, 1, 2, 1] = 0.5
    quiet[:, ::2, :, 1, 2] = 0
    found, *_ = emulate(emulator, tmp_path / 'call', inputs._replace(locations=hostile),
                       deterministic=deterministic)
    expected = exact(inputs._replace(weights=quiet))
    for index in (0, 1):
        torch.testing.assert_close(found[index].double(), expected[index], atol=1e-5, rtol=1e-5)
    assert not found[2][:, ::2, :, 1, 2].any() and not found[3][:, ::2, :, 1, 2].any()


@pytest.mark.hostile
@pytest.mark.skipif(not _extension.is_available, reason='no compiled kernels')
@pytest.mark.parametrize('deterministic', [False, True])
@pytest.mark.parametrize('name', ['encoder', 'tiny-levels', 'very-wide'])
def test_nan_stays_where_it_is_sampled(emulator, tmp_path, name, deterministic):
    """Pixels, gradients and weights that are NaN reach what depends on them, and nothing else."""
    inputs = make_inputs(name, DTYPES['f32'])
    inputs.value[0, -2] = math.nan
    inputs.value[:, 0] = math.nan  # must not stand in for the pixel of a sample outside
    inputs.grad_output[-1, 2, :3] = math.nan
    inputs.weights[0, 1, 0, 0, 0] = math.nan
    found, *_ = emulate(emulator, tmp_path / 'call', inputs, deterministic=deterministic)
    for one, right in zip(found, on_the_cpu(inputs)):
        assert right.isnan().any() or one is found[2]
        assert torch.equal(one.isnan(), right.isnan())


@pytest.mark.hostile
@pytest.mark.skipif(not _extension.is_available, reason='no compiled kernels')
def test_whole_positions(emulator, tmp_path):
    """Samples exactly on pixel centres, on the first and last ones, and a pixel outside."""
    inputs = make_inputs((1, 24, 1, 8, 1, [(4, 4)]), DTYPES['f64'])
    place = torch.tensor([(x, y) for y in (-1.0, 0, 3, 4) for x in (-1.0, 0, 1, 2, 3, 4)],
                         dtype=F64)
    inputs.locations[0, :, 0, 0, 0] = (place + 0.5) / 4
    actual, *_ = emulate(emulator, tmp_path / 'call', inputs)
    for found, target in zip(actual, on_the_cpu(inputs)):
        torch.testing.assert_close(found, target, atol=1e-12, rtol=1e-12)


@pytest.mark.hostile
def test_all_samples_in_one_place(emulator, tmp_path):
    inputs = make_inputs('crowded', DTYPES['f32'])
    inputs.locations[:] = inputs.locations[0, 0, 0]
    actual, *_ = emulate(emulator, tmp_path / 'call', inputs)
    assert_accurate(actual, inputs, factor=2)
