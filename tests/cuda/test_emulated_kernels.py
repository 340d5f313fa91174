# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels, run thread by thread on the CPU under ASan and UBSan, against the reference.

What a GPU adds to this — timing, the order of reductions, the compiler's own mistakes — only a GPU
can test: tests/cuda/test_dcnv4_gpu.py.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys

import pytest
import torch

from helpers.cuda_cases import (
    DTYPES,
    F32,
    F64,
    SIZES,
    assert_norms,
    hostile_offsets,
    make_call,
    size_name,
)
from helpers.emulate import (
    CODE,
    GPU,
    ONE_PROCESSOR,
    SCHEDULES,
    THREE,
    from_bytes,
    sizes_text,
    to_bytes,
)
from mmdcnv4.ops import dcnv4_reference, offset_mask_channels
from mmdcnv4.ops.contract import make_geometry
from mmdcnv4.testing import (
    GEOMETRIES,
    assert_accurate,
    assert_within,
    error_bounds,
    forward_backward,
)


def emulate(emulator, path, inputs, grad_output, *, groups, schedule=None, alignment=16,
            device=GPU, **geometry):
    """Output, grad_value (rounded to the dtype of value), grad_offset_mask; both plans and what is
    added.

    These kernels have no copies in the background: where those would land at once, numbers are
    added one by one, as before sm_90, instead.
    """
    value, packed = inputs.value, inputs.offset_mask
    data = to_bytes(value) + to_bytes(packed) + to_bytes(grad_output)
    path.write_bytes(data)
    call = (f'{path} {emulator.code(schedule)} {alignment} {CODE[value.dtype]} '
            f'{CODE[packed.dtype]} {" ".join(map(str, device))} '
            f'{sizes_text(value, groups, geometry)}\n')
    options = ['before_sm_90'] * (schedule or emulator.schedule).endswith('-at-once')
    *plans, added = json.loads(emulator('run', call, *options))
    rest = path.read_bytes()[len(data):]
    output, rest = from_bytes(rest, value.dtype, grad_output.shape)
    grad_value, rest = from_bytes(rest, F64 if value.dtype == F64 else F32, value.shape)
    grad_packed, rest = from_bytes(rest, packed.dtype, packed.shape)
    assert not rest
    return (output, grad_value.to(value.dtype), grad_packed), plans, added


def exponent_above(tensor):
    """log2 of a power of two above the largest finite number."""
    largest = tensor.double().nan_to_num(0, 0, 0).abs().max()
    return largest.log2().floor().add(1).clamp(-1100, 1024)


def emulate_fixed(emulator, path, inputs, grad_output, *, groups, schedule=None, **geometry):
    """Gradients by the kernel with sums in fixed point."""
    value, packed = inputs
    points = make_geometry(groups=groups, **geometry).points
    mask = packed[..., :3 * points * groups].unflatten(-1, (groups, -1))[..., 2 * points:]
    exponent = exponent_above(grad_output)
    if not geometry.get('softmax'):
        exponent = exponent + exponent_above(mask)
    data = b''.join(map(to_bytes, (value, packed, grad_output, 2 ** -exponent.clamp(max=1024))))
    path.write_bytes(data)
    call = (f'{path} {emulator.code(schedule)} 16 {CODE[value.dtype]} {CODE[packed.dtype]} '
            f'{" ".join(map(str, GPU))} {sizes_text(value, groups, geometry)}\n')
    emulator('fixed', call)
    grad_value, rest = from_bytes(path.read_bytes()[len(data):], F64, value.shape)
    grad_packed, rest = from_bytes(rest, packed.dtype, packed.shape)
    assert not rest
    return grad_value.to(value.dtype), grad_packed


def check(emulator, tmp_path, size, dtypes, geometry, **options):
    """Compares one call with the reference; returns the plans."""
    inputs, grad_output = make_call(size, dtypes, geometry)
    geometry = dict(geometry, groups=size[3])
    actual, plans, _ = emulate(emulator, tmp_path / 'call', inputs, grad_output, **geometry,
                               **options)
    assert_norms(actual, assert_accurate(actual, inputs, grad_output, **geometry))
    return plans


@pytest.mark.parametrize('name', GEOMETRIES)
@pytest.mark.parametrize('dtypes', DTYPES)
def test_geometries(emulator, tmp_path, name, dtypes):
    """Every geometry in every dtype, two images of an uneven number of queries per block."""
    check(emulator, tmp_path, (2, 7, 9, 3, 16), DTYPES[dtypes], GEOMETRIES[name])


@pytest.mark.parametrize('dtypes', ['f64', 'f32', 'f16', 'bf16-f32'])
@pytest.mark.parametrize('size', SIZES, ids=size_name)
def test_sizes(emulator, tmp_path, size, dtypes):
    check(emulator, tmp_path, size, DTYPES[dtypes], GEOMETRIES['3x3'], device=ONE_PROCESSOR)


@pytest.mark.parametrize('dtypes', ['f32', 'f16'])
def test_many_taps(emulator, tmp_path, dtypes):
    """More taps than fit into one pass over shared memory, with and without a remainder."""
    for kernel_size in ((3, 6), (4, 5), (7, 4)):
        check(emulator, tmp_path, (1, 4, 5, 2, 24), DTYPES[dtypes],
              dict(kernel_size=kernel_size, padding=3, softmax=kernel_size[0] == 4))


@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('elements', [1, 2, 4])
def test_alignment(emulator, tmp_path, dtypes, elements):
    """Tensors that start in the middle of a vector get narrower loads: 8 bytes, or one number."""
    dtypes = DTYPES[dtypes]
    alignment = min(16, elements * dtypes[0].itemsize)
    plans = check(emulator, tmp_path, (2, 3, 5, 2, 16), dtypes, GEOMETRIES['3x3'],
                  alignment=alignment)
    has_vectors = alignment >= 8 and dtypes[0] != torch.float64
    vec = alignment // dtypes[0].itemsize if has_vectors else 1
    assert [plan['vec'] for plan in plans] == [vec, min(vec, 4)]


@pytest.mark.parametrize('shared_bytes', [48 * 1024, 24 * 1024, 16 * 1024, 4 * 1024])
def test_little_shared_memory(emulator, tmp_path, shared_bytes):
    plans = check(emulator, tmp_path, (2, 5, 7, 2, 32), DTYPES['f16'], GEOMETRIES['3x3'],
                  device=(1, shared_bytes, shared_bytes, 2**31 - 1))
    assert all(plan['shared_bytes'] <= shared_bytes for plan in plans)


def test_several_launches(emulator, tmp_path):
    """A grid that does not hold the batch: seven images, two launches or more."""
    plans = check(emulator, tmp_path, (7, 3, 5, 2, 16), DTYPES['f32'], GEOMETRIES['3x3'],
                  device=(132, 48 * 1024, 48 * 1024, 11))
    for plan in plans:
        blocks = plan['slices'] * plan['tiles_h'] * plan['tiles_w']
        assert 1 <= plan['images_per_launch'] < 7 and plan['images_per_launch'] * blocks <= 11


@pytest.mark.parametrize('dtypes', ['f16', 'bf16-f32'])
def test_flash_intern_image_l(emulator, tmp_path, dtypes):
    """Stage 4 of the large model: 80 groups, more threads per query than a block may have."""
    geometry = dict(kernel_size=3, padding=1, offset_scale=2.0)
    check(emulator, tmp_path, (2, 3, 2, 80, 16), DTYPES[dtypes], geometry)


@pytest.mark.parametrize('name', ['3x3', '3x3-softmax', '5x5'])
@pytest.mark.parametrize('depth', [8, 24, 70])
def test_order_of_threads(emulator, tmp_path, name, depth):
    """The threads of a block take turns in three ways: anything but one result is a race."""
    geometry = dict(GEOMETRIES[name], groups=3)
    inputs, grad_output = make_call((2, 4, 3, 3, depth), DTYPES['f32'], GEOMETRIES[name])
    inputs = hostile_offsets(inputs, make_geometry(**geometry).points)
    inputs.value[:, 0, 0] = torch.nan  # taps outside must not even start to read it
    results = [emulate(emulator, tmp_path / order, inputs, grad_output, schedule=order,
                       **geometry)[0] for order in THREE]
    assert not results[0][0].isnan().all() and results[0][0].isnan().any()
    for output, grad_value, grad_packed in results[1:]:
        same = dict(rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(output, results[0][0], **same)
        torch.testing.assert_close(grad_packed, results[0][2], **same)
        torch.testing.assert_close(grad_value, results[0][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('dtypes', ['f32', 'f16', 'bf16-f32'])
@pytest.mark.parametrize('depth', [8, 16, 32, 64, 96])
@pytest.mark.parametrize('schedule', ['forward', 'forward-at-once'], indirect=True)
def test_reductions_fill_sectors(emulator, tmp_path, schedule, depth, dtypes):
    """Of 32 bytes each: they are what a GPU's reductions wait for, also where a reduction adds one
    number and the threads of several groups or pixels must add together."""
    geometry = dict(GEOMETRIES['3x3'], groups=2)
    inputs, grad_output = make_call((1, 5, 7, 2, depth), DTYPES[dtypes], GEOMETRIES['3x3'])
    actual, _, added = emulate(emulator, tmp_path / 'call', inputs, grad_output, **geometry)
    assert_accurate(actual, inputs, grad_output, **geometry)
    corners, rest = divmod(added['numbers'], depth)
    assert corners > 0 and rest == 0
    assert added['sectors'] <= corners * (depth // 8)


@pytest.mark.parametrize('dtypes', ['f32', 'f16'])
@pytest.mark.parametrize('depth', [8, 16, 32, 33])
@pytest.mark.parametrize('schedule', ['forward', 'forward-at-once'], indirect=True)
def test_rows_that_do_not_exist_read_nothing(emulator, tmp_path, schedule, depth, dtypes):
    """Of a map of one pixel, behind whose last group nothing is."""
    check(emulator, tmp_path, (1, 1, 1, 9, depth), DTYPES[dtypes], GEOMETRIES['3x3'])


@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('name', ['3x3', '3x3-softmax'])
def test_fixed_point(emulator, tmp_path, name, dtypes):
    """Sums in fixed point: right, and bitwise the same in any order of threads."""
    geometry = dict(GEOMETRIES[name], groups=3)
    inputs, grad_output = make_call((2, 5, 7, 3, 6), DTYPES[dtypes], GEOMETRIES[name])
    inputs = hostile_offsets(inputs, make_geometry(**geometry).points)
    results = [emulate_fixed(emulator, tmp_path / order, inputs, grad_output, schedule=order,
                             **geometry) for order in THREE]
    exact = forward_backward(dcnv4_reference, inputs.leaves(F64, F64), grad_output, **geometry)[1:]
    bounds = error_bounds(inputs, grad_output, **geometry)[1:]
    mask = inputs.offset_mask[..., :81].unflatten(-1, (3, 27))[..., 18:]
    # a step is below 2^-47 of the largest term, hidden by the bound of all types but float64
    largest = grad_output.abs().max().double() * (1 if 'softmax' in name else mask.abs().max())
    assert_within(results[0][0], exact[0], bounds[0] + 2.0**-40 * largest, 'grad_value')
    assert_within(results[0][1], exact[1], bounds[1], 'grad_offset_mask')
    for other in results[1:]:
        assert all(map(torch.equal, other, results[0]))


@pytest.mark.hostile
def test_fixed_point_of_hostile_numbers(emulator, tmp_path):
    """NaN and infinite numbers stay what they are; numbers of any size do not overflow."""
    geometry = dict(GEOMETRIES['3x3'], groups=2)
    inputs, grad_output = make_call((1, 9, 7, 2, 4), DTYPES['f32'], GEOMETRIES['3x3'])
    for size in (1e-30, 1.0, 1e30):
        grads = grad_output * size
        grads[0, 0, 0], grads[0, 8, 6, 1], grads[0, 4, 3, ::3] = torch.nan, torch.inf, -torch.inf
        actual = emulate_fixed(emulator, tmp_path / 'call', inputs, grads, **geometry)[0]
        expected = forward_backward(dcnv4_reference, inputs, grads, **geometry)[1]
        assert expected.isnan().any() and expected.isinf().any() and expected.isfinite().any()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5 * size, equal_nan=True)


@pytest.mark.hostile
@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('name', ['3x3', '3x3-strided', '3x3-ring', '5x5'])
def test_hostile_offsets(emulator, tmp_path, name, dtypes):
    """NaN, infinite, huge and whole offsets: nothing but the taps in reach counts."""
    geometry = dict(GEOMETRIES[name], groups=3)
    points = make_geometry(**geometry).points
    inputs, grad_output = make_call((2, 5, 7, 3, 8), DTYPES[dtypes], GEOMETRIES[name])
    inputs = hostile_offsets(inputs, points)
    actual, *_ = emulate(emulator, tmp_path / 'call', inputs, grad_output, **geometry)
    assert all(tensor.isfinite().all() for tensor in actual)
    assert_accurate(actual, inputs, grad_output, **geometry)


@pytest.mark.hostile
@pytest.mark.parametrize('dtypes', DTYPES)
@pytest.mark.parametrize('name', ['3x3', '3x3-softmax', '2x4'])
def test_pixels_that_are_nan(emulator, tmp_path, name, dtypes):
    """NaN pixels spread as far as in the reference: to the samples that touch them, no further."""
    geometry = dict(GEOMETRIES[name], groups=2)
    inputs, grad_output = make_call((2, 9, 7, 2, 12), DTYPES[dtypes], GEOMETRIES[name])
    inputs = hostile_offsets(inputs, make_geometry(**geometry).points)
    for y, x in ((0, 6), (8, 0), (8, 6), (4, 3)):  # corners are where clamped coordinates end up
        inputs.value[:, y, x] = torch.nan
    actual, *_ = emulate(emulator, tmp_path / 'call', inputs, grad_output, **geometry)
    expected = forward_backward(dcnv4_reference, inputs, grad_output, **geometry)
    for name, one, other in zip(('output', 'grad_value', 'grad_offset_mask'), actual, expected):
        assert other.isnan().any() == (name != 'grad_value')
        assert not other.isnan().all(), name
        assert torch.equal(one.isnan(), other.isnan()), name
    # the first pixel for the output alone: the reference gathers it in place of missing corners,
    # and its gradient is 0 * NaN there
    inputs.value[:, 0, 0] = torch.nan
    actual, *_ = emulate(emulator, tmp_path / 'call', inputs, grad_output, **geometry)
    expected = dcnv4_reference(*inputs, **geometry)
    assert torch.equal(actual[0].isnan(), expected.isnan())


def test_padding_has_no_gradient(emulator, tmp_path):
    inputs, grad_output = make_call((1, 3, 5, 3, 8), DTYPES['f16'], GEOMETRIES['3x3'])
    actual, *_ = emulate(emulator, tmp_path / 'call', inputs, grad_output, groups=3,
                        **GEOMETRIES['3x3'])
    assert actual[2].shape[-1] == offset_mask_channels(3, 9) == 88
    assert (actual[2][..., 81:] == 0).all() and (actual[2][..., :81] != 0).any()


def random_sizes(generator):
    def pair(low, high):
        return generator.randint(low, high), generator.randint(low, high)

    is_common = generator.random() < 0.3  # as tensor cores want it: 3x3, stride 1
    kernel, stride, dilation = ((3, 3), (1, 1), (1, 1)) if is_common else (
        pair(1, 4), pair(1, 3), pair(1, 3))
    pad = tuple(d * (k - 1) // 2 + generator.randint(0, 1) for k, d in zip(kernel, dilation))
    depth = generator.choice([16, 32, 64] if is_common else
                             [1, 2, 3, 4, 6, 8, 16, 24, 32, 48, 64, 70, 96, 256, 1000])
    numbers = [generator.randint(1, 4), *(generator.randint(d * (k - 1) + 1, 20)
                                          for k, d in zip(kernel, dilation)),
               generator.randint(1, 24), depth, *kernel, *stride, *pad, *dilation,
               generator.choice([0.5, 1.0, 2.0]), 0, 0]
    shared = generator.choice([24, 48, 96]) * 1024
    device = (generator.choice([1, 20, 132]), shared, shared + generator.choice([0, 130]) * 1024,
              generator.choice([2**31 - 1, 20000]))
    dtype = generator.randint(1 if is_common else 0, 3)
    alignment = 16 if is_common else max(generator.choice([2, 4, 8, 16]), (8, 4, 2, 2)[dtype])
    return ' '.join(map(str, (alignment, dtype, generator.randint(0, 1), *device, *numbers)))


def test_launch_plans(emulator):
    """3000 random calls: every row is computed by its whole team, once; no limit is broken.

    Where the tensor-core kernels are made for the call, the same of their tiles.
    """
    generator = random.Random(0)
    calls = '\n'.join(random_sizes(generator) for _ in range(3000))
    plans, windows = zip(*map(json.loads, emulator('cover', calls).splitlines()))
    assert len(plans) == 3000
    assert {window['is_made_for'] for window in windows} == {0, 1}
    assert {(window['tile_h'], window['tile_w']) for window in windows
            if window['is_made_for']} == {(8, 16), (8, 8), (4, 8)}
    assert {plan['threads'] for plan in plans} == {32, 64, 128, 256}
    assert {plan['vec'] for plan in plans} == {1, 2, 4, 8}
    assert {plan['team'] for plan in plans} == {1, 2, 4, 8, 16, 32}


def test_every_schedule_can_be_asked_for():
    """`--schedules all`; tests that name theirs keep it."""
    result = subprocess.run([sys.executable, '-m', 'pytest', '--collect-only', '-q', '--schedules',
                             'all', __file__], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:]
    names = re.findall(r'::(\w+)\[', result.stdout)
    assert names.count('test_many_taps') == 2 * len(SCHEDULES)
    assert names.count('test_rows_that_do_not_exist_read_nothing') == 2 * 8


def test_the_emulator_itself(emulator):
    """It refuses what it does not understand, rather than report success."""
    result = subprocess.run([emulator.program, 'walk'], capture_output=True, text=True)
    assert result.returncode == 2 and "got 'walk'" in result.stderr
    result = subprocess.run([emulator.program, 'cover'], input='16 1 0 132\n', capture_output=True,
                            text=True)
    assert result.returncode == 1 and 'a number is missing' in result.stderr
