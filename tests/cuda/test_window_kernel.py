# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The tensor-core forward kernel, warp by warp on the CPU, against the reference.

Its matrix fragments, background copies and shared memory are those of emulator/warp_words.cpp;
ASan and UBSan watch. Bank conflicts are compared with what the layouts are designed for.
"""

from __future__ import annotations

import json

import pytest
import torch

from helpers.cuda_cases import F16, assert_norms, hostile_offsets, make_call, size_name
from helpers.emulate import GPU, ONE_PROCESSOR, THREE, emulate_window
from helpers.window_cases import (
    FORWARD_WEIGHTS,
    GEOMETRIES,
    HARD_TO_SPLIT,
    KERNELS,
    SIZES,
    TYPES,
    WINDOW_NORMS,
)
from mmdcnv4.ops import dcnv4_reference
from mmdcnv4.ops.contract import make_geometry
from mmdcnv4.testing import assert_accurate, random_grad_output

SAME_TYPES = ['f16', 'bf16', 'f32']
WIDTHS = [kernel for kernel in KERNELS if kernel[1] in SAME_TYPES]


def assert_window(actual, inputs, **geometry):
    """Compares with the reference; weights are rounded."""
    assert_norms([actual], assert_accurate(
        [actual], inputs, random_grad_output(inputs), **geometry,
        weight_error=FORWARD_WEIGHTS[actual.dtype]), WINDOW_NORMS)


def check(emulator, tmp_path, inputs, *, groups, **options):
    """Compares one call with the reference; returns output, plan and accesses."""
    geometry = {key: value for key, value in options.items()
                if key not in ('schedule', 'device', 'count')}
    actual, plan, accesses = emulate_window(emulator, tmp_path / 'call', inputs, groups=groups,
                                            **options)
    assert_window(actual, inputs, groups=groups, **geometry)
    return actual, plan, accesses


def scale_offsets(inputs, groups, points, factor):
    """In place."""
    used = inputs.offset_mask[..., :3 * points * groups].unflatten(-1, (groups, 3 * points))
    used[..., :2 * points] *= factor


def keep_near(inputs, groups, points):
    """In place: at rest the two taps by which a unit is judged, so that it takes the product."""
    used = inputs.offset_mask[..., :3 * points * groups].unflatten(-1, (groups, 3 * points))
    used[..., [2, 3, 10, 11]] = 0


def parts_taken(accesses):
    """Which of the two ways the units of a call went: with a product, or gathered without."""
    return {way for way, phase in (('product', 'scatter'), ('gather', 'taps'))
            if accesses.get(phase, {}).get('instructions')}


@pytest.mark.parametrize('name', ['3x3', '3x3-ring'])
@pytest.mark.parametrize(('depth', 'dtypes'), KERNELS)
@pytest.mark.parametrize('way', ['product', 'gather'])
def test_geometries(emulator, tmp_path, name, dtypes, depth, way):
    """Every kernel that is compiled; samples in windows, far from them and outside the image."""
    inputs, _ = make_call((2, 5, 9, 3, depth), TYPES[dtypes], GEOMETRIES[name])
    points = make_geometry(groups=3, **GEOMETRIES[name]).points
    scale_offsets(inputs, 3, points, 2.0)
    if way == 'product':
        keep_near(inputs, 3, points)
    _, plan, accesses = check(emulator, tmp_path, inputs, groups=3, count=True, **GEOMETRIES[name])
    # units without a row take the product
    assert plan['is_made_for'] and parts_taken(accesses) in ({way}, {'product', way})
    assert accesses['far']['instructions'] > 0


@pytest.mark.parametrize('way', ['product', 'gather'])
def test_shifted_maps(emulator, tmp_path, way):
    """Output smaller and larger than the input, offsets that turn back."""
    geometry = dict(kernel_size=3, padding=(0, 2), offset_scale=-0.75)
    inputs, _ = make_call((2, 7, 9, 3, 32), TYPES['f16'], geometry)
    scale_offsets(inputs, 3, 9, 2.0)
    if way == 'product':
        keep_near(inputs, 3, 9)
    _, _, accesses = check(emulator, tmp_path, inputs, groups=3, count=True, **geometry)
    assert way in parts_taken(accesses)


@pytest.mark.parametrize(('size', 'dtypes'), [
    (size, dtypes) for dtypes in ('f16', 'bf16-f32', 'f32') for size in SIZES
    if dtypes != 'f32' or size[4] < 64], ids=lambda part: part if isinstance(part, str) else
    size_name(part))
def test_sizes(emulator, tmp_path, size, dtypes):
    inputs, _ = make_call(size, TYPES[dtypes], GEOMETRIES['3x3'])
    check(emulator, tmp_path, inputs, groups=size[3], device=ONE_PROCESSOR, **GEOMETRIES['3x3'])


@pytest.mark.parametrize('shared_bytes', [227 * 1024, 99 * 1024, 64 * 1024, 48 * 1024])
def test_little_shared_memory(emulator, tmp_path, shared_bytes):
    """Devices with less of it get smaller tiles and fewer warps."""
    inputs, _ = make_call((1, 8, 16, 4, 16), TYPES['f16'], GEOMETRIES['3x3'])
    _, plan, _ = check(emulator, tmp_path, inputs, groups=4,
                       device=(1, 48 * 1024, shared_bytes, 2**31 - 1), **GEOMETRIES['3x3'])
    assert plan['shared_bytes'] <= shared_bytes


@pytest.mark.parametrize('dtypes', ['bf16', 'f32'])
def test_several_launches(emulator, tmp_path, dtypes):
    inputs, _ = make_call((5, 3, 5, 2, 16), TYPES[dtypes], GEOMETRIES['3x3'])
    _, plan, _ = check(emulator, tmp_path, inputs, groups=2,
                       device=(132, 48 * 1024, 99 * 1024, 2), **GEOMETRIES['3x3'])
    assert plan['images_per_launch'] == 2


@pytest.mark.hostile
@pytest.mark.parametrize('dtypes', TYPES)
@pytest.mark.parametrize('name', ['3x3', '3x3-ring'])
@pytest.mark.parametrize('way', ['product', 'gather'])
def test_hostile_offsets(emulator, tmp_path, way, name, dtypes):
    """NaN, infinite, huge and whole offsets: nothing but the taps in reach counts."""
    inputs, _ = make_call((2, 5, 7, 3, 16), TYPES[dtypes], GEOMETRIES[name])
    points = make_geometry(groups=3, **GEOMETRIES[name]).points
    inputs = hostile_offsets(inputs, points)
    if way == 'product':
        keep_near(inputs, 3, points)
    actual, _, accesses = check(emulator, tmp_path, inputs, groups=3, count=True,
                                **GEOMETRIES[name])
    assert torch.isfinite(actual).all() and way in parts_taken(accesses)


@pytest.mark.hostile
@pytest.mark.parametrize('dtypes', TYPES)
@pytest.mark.parametrize('name', ['3x3', '3x3-ring'])
@pytest.mark.parametrize('bad', [float('nan'), float('inf')])
@pytest.mark.parametrize('way', ['product', 'gather'])
def test_pixels_that_are_not_finite(emulator, tmp_path, way, bad, name, dtypes):
    """They reach the outputs that sample them, though a product meets them with every row."""
    options = dict(GEOMETRIES[name], groups=2)
    inputs, _ = make_call((2, 9, 7, 2, 16), TYPES[dtypes], GEOMETRIES[name])
    points = make_geometry(**options).points
    inputs = hostile_offsets(inputs, points)
    if way == 'product':
        keep_near(inputs, 2, points)
    for y, x in ((0, 0), (0, 6), (8, 0), (8, 6), (4, 3)):
        inputs.value[:, y, x, ::5] = bad  # one of four neighbours at most
    expected = dcnv4_reference(*inputs, **options)
    actual, _, accesses = emulate_window(emulator, tmp_path / 'call', inputs, count=True,
                                         **options)
    is_bad = ~expected.isfinite()
    assert way in parts_taken(accesses)
    assert is_bad.any() and not is_bad[..., ::5].all()
    assert not is_bad[..., torch.arange(32) % 5 > 0].any()
    assert torch.equal(~actual.isfinite(), is_bad)
    if bad != bad:
        assert torch.equal(actual.isnan(), expected.isnan())
    assert_window(actual, inputs, **options)


@pytest.mark.hostile
@pytest.mark.parametrize('where', ['value', 'mask'])
def test_split_of_what_has_no_room(emulator, tmp_path, where):
    """The largest float32 is infinite in TF32, and NaN may be zero or infinite there: the device
    makes NaN whose bits are all set."""
    options = dict(GEOMETRIES['3x3'], groups=2)
    inputs, _ = make_call((1, 13, 9, 2, 16), TYPES['f32'], GEOMETRIES['3x3'])
    scale_offsets(inputs, 2, 9, 0.2)
    keep_near(inputs, 2, 9)
    mask = inputs.offset_mask[..., :54].unflatten(-1, (2, 27))[..., 18:]
    tensors = dict(value=inputs.value, mask=mask.transpose(3, 4))
    for tensor in tensors.values():
        tensor.mul_(2.0**-10)
    for i, number in enumerate(HARD_TO_SPLIT):
        tensors[where][0, 3 * i, 4, 2::7] = number
    actual, _, accesses = emulate_window(emulator, tmp_path / 'call', inputs, count=True,
                                         **options)
    expected = dcnv4_reference(*inputs, **options)
    assert parts_taken(accesses) == {'product'}
    assert expected.isnan().any() and not expected.isnan().all() and not expected.isinf().any()
    assert torch.equal(actual.isnan(), expected.isnan())
    assert expected[expected.isfinite()].abs().max() > 1e34
    assert_window(actual, inputs, **options)


@pytest.mark.hostile
@pytest.mark.parametrize('content', [float('nan'), 1e4])
@pytest.mark.parametrize('way', ['product', 'gather'])
def test_padding_of_any_content(emulator, tmp_path, way, content):
    """Chunks of numbers and units of two groups reach into it; nor does it say which way to go."""
    inputs, _ = make_call((1, 5, 7, 3, 16), TYPES['f16'], GEOMETRIES['3x3'])
    if way == 'product':
        keep_near(inputs, 3, 9)
    results, accesses = [], []
    for filling in (0.0, content):
        inputs.offset_mask[..., 81:] = filling
        output, _, counts = emulate_window(emulator, tmp_path / 'call', inputs, groups=3,
                                           count=True, **GEOMETRIES['3x3'])
        results.append(output)
        accesses.append({phase: count['instructions'] for phase, count in counts.items()})
    assert torch.equal(*results) and accesses[0] == accesses[1]
    assert way in parts_taken(counts)


@pytest.mark.hostile
@pytest.mark.parametrize('dtypes', TYPES)
@pytest.mark.parametrize('way', ['product', 'gather'])
def test_masks_of_every_size(emulator, tmp_path, way, dtypes):
    """Each row is as accurate as its own masks allow; bad masks outside the image do not count."""
    options = dict(GEOMETRIES['3x3'], groups=2)
    inputs, _ = make_call((1, 8, 8, 2, 16), TYPES[dtypes], GEOMETRIES['3x3'])
    mask = inputs.offset_mask[..., :54].unflatten(-1, (2, 27))[..., 18:]
    sizes = torch.tensor([0.0, 1e-4, 1.0, 6e4] if inputs.offset_mask.dtype == F16 else
                         [0.0, 1e-4, 1.0, 1e5, 1e30, 1e-30])
    if inputs.value.dtype == F16:
        sizes = sizes.clamp(max=6e4)
        inputs.value.mul_(1 / 128)
    rows = sizes[torch.randint(len(sizes), mask.shape[:-1])]
    mask.copy_(mask.clamp(-1, 1) * rows[..., None])
    inputs.offset_mask[0, 0, 0, 18] = torch.nan  # of the first tap of the first pixel
    inputs.offset_mask[0, 0, 0, :2] = -5.0  # far outside
    inputs.offset_mask[0, 7, 7, 18:27] = torch.inf
    if way == 'product':
        keep_near(inputs, 2, 9)
    actual, _, accesses = emulate_window(emulator, tmp_path / 'call', inputs, count=True,
                                         **options)
    expected = dcnv4_reference(*inputs, **options)
    assert way in parts_taken(accesses)
    assert not expected[0, 7, 7].isfinite().all() and expected[0, 0, 0].isfinite().all()
    assert_window(actual, inputs, **options)


@pytest.mark.parametrize('dtypes', ['f16', 'bf16', 'f32'])
@pytest.mark.parametrize('way', ['product', 'gather'])
def test_order_of_threads(emulator, tmp_path, way, dtypes):
    """Threads in three orders, copies late and early, bitwise one result: else there is a race."""
    options = dict(GEOMETRIES['3x3'], groups=5)
    inputs, _ = make_call((1, 9, 7, 5, 16), TYPES[dtypes], GEOMETRIES['3x3'])
    inputs = hostile_offsets(inputs, 9)
    if way == 'product':
        keep_near(inputs, 5, 9)
    inputs.value[:, 4, 4] = torch.nan
    results = [emulate_window(emulator, tmp_path / name, inputs, schedule=name, count=True,
                              **options)
               for name in THREE]
    assert way in parts_taken(results[0][2])
    for output, _, accesses in results[1:]:
        torch.testing.assert_close(output, results[0][0], rtol=0, atol=0, equal_nan=True)
        assert accesses == results[0][2]


@pytest.mark.parametrize('dtypes', ['f16', 'bf16-f32', 'f32'])
@pytest.mark.parametrize('way', ['product', 'gather'])
def test_two_units_of_a_warp(emulator, tmp_path, way, dtypes):
    """One after the other in the same memory, without a barrier of the block in between."""
    inputs, _ = make_call((1, 16, 32, 4, 16), TYPES[dtypes], GEOMETRIES['3x3'])
    if way == 'product':
        keep_near(inputs, 4, 9)
    _, plan, _ = check(emulator, tmp_path, inputs, groups=4, device=ONE_PROCESSOR,
                       **GEOMETRIES['3x3'])
    assert plan['tile_h'] * plan['tile_w'] * 4 / 32 == 2 * plan['threads'] / 32


def slice_groups(depth, dtype):
    """Groups of `depth` channels in the 128 bytes of a tile's cell."""
    return 128 // dtype.itemsize // depth


def accesses_per_unit(emulator, tmp_path, depth, dtypes, spread):
    """Instructions and wavefronts of shared memory per unit of 32 rows, by phase."""
    groups = slice_groups(depth, TYPES[dtypes][0])
    geometry = dict(kernel_size=3, padding=1)
    inputs, _ = make_call((1, 16, 32, groups, depth), TYPES[dtypes], geometry)
    packed = inputs.offset_mask[..., :27 * groups].unflatten(-1, (groups, 27))
    packed[..., :18] = torch.randn(packed[..., :18].shape) * spread
    _, plan, accesses = check(emulator, tmp_path, inputs, groups=groups, device=ONE_PROCESSOR,
                              count=True, **geometry)
    assert (plan['tile_h'], plan['tile_w']) == (8, 16)
    units = 16 * 32 * groups / 32
    return {phase: (count['instructions'] / units, count['wavefronts'] / units)
            for phase, count in accesses.items()}


@pytest.mark.parametrize('dtypes', SAME_TYPES)
def test_bank_conflicts(emulator, tmp_path, dtypes):
    """Units of 4x4 pixels, two groups of 32, or two blocks of one in float32: what the layouts were
    designed for, no more."""
    still = accesses_per_unit(emulator, tmp_path, 32, dtypes, 0)
    assert still['clear'] == (16, 64)  # 8 KB by 128 bytes
    assert still['weights'] == (64, 64)  # 64 cells, 32 rows, a number at a time
    # 64 cells of 128 bytes, once each; in float32 twice as many, and a number at a time
    assert still['pixels'] == ((128, 128) if dtypes == 'f32' else (16, 64))
    assert still['collect'] == (16, 32) and still['finish'] == (8, 32)  # 4 KB out and back
    # two pixels share a bank, of 32 four
    instructions, ways = (27, 4) if dtypes == 'f32' else (16, 2)
    assert still['numbers'][0] == instructions and still['numbers'][1] <= ways * instructions
    # nine taps, four cells, read and written; in random places two rows may want the same bank
    assert still['scatter'] == (72, 72)
    moved = accesses_per_unit(emulator, tmp_path, 32, dtypes, 0.5)
    assert moved['scatter'][0] == 72 and moved['scatter'][1] <= 150
    for phase in ('clear', 'weights', 'pixels', 'collect', 'finish'):
        assert moved[phase] == still[phase]
    # most units have a layer of few far taps, a round: two matrices of 16 cells from anywhere, and
    # where some of them are not among the tile's cells two copies there before
    loads = 8 if dtypes == 'f32' else 2  # a number at a time, or a matrix
    assert still['far'] == (0, 0) and 0.6 * loads <= moved['far'][0] <= 2 * loads
    assert moved['far'][1] <= (2 if dtypes == 'f32' else 5) * moved['far'][0]


@pytest.mark.parametrize(('depth', 'dtypes'), WIDTHS)
@pytest.mark.parametrize('lengths', [(2, 3), (2, 9), (6, 9)])
def test_many_far_taps(emulator, tmp_path, depth, dtypes, lengths):
    """Rows with seven far taps, next to rows with none: layers of one tap a row, taken in rounds.

    Of corners among the tile's cells, elsewhere in the image, and both in a round.
    """
    dtype = TYPES[dtypes][0]
    groups = slice_groups(depth, dtype)
    geometry = dict(kernel_size=3, padding=1)
    inputs, _ = make_call((1, 24, 32, groups, depth), TYPES[dtypes], geometry)
    scale_offsets(inputs, groups, 9, 0)
    packed = inputs.offset_mask[..., :27 * groups].unflatten(-1, (groups, 27))
    x, y = torch.meshgrid(torch.arange(32), torch.arange(24), indexing='xy')
    is_far = (x + y) % 4 == 0
    towards = torch.where(torch.stack((x, y), -1)[is_far] < torch.tensor([16, 12]), 1.0, -1.0)
    moves = torch.randint(4 * lengths[0], 4 * lengths[1], (1, len(towards), groups, 9, 2)) / 4
    moves[..., [1, 5], :] = 0  # those by which a unit is judged
    packed[:, is_far, :, :18] = (moves * towards[:, None, None]).flatten(-2).to(dtype)
    _, plan, accesses = check(emulator, tmp_path, inputs, groups=groups, count=True,
                              device=ONE_PROCESSOR, **geometry)
    assert (plan['tile_h'], plan['tile_w']) == (8, 16) and parts_taken(accesses) == {'product'}
    units = 24 * 32 * groups // 32
    count = accesses['far']['instructions'] / units
    # seven layers of eight rows each, in rounds of four taps, or of two
    of_round, at_a_time = (2, 2) if dtypes == 'f32' else (4, 1)
    loads = 7 * 8 / of_round * depth * dtype.itemsize / 32  # of 32 bytes of the cells of a round
    products = loads * at_a_time  # a number at a time, or a matrix
    copies = count - products
    most = 2 * loads * of_round / 4  # read from the tile's cells and written, by all lanes
    assert accesses['finish']['instructions'] == units * depth // 4
    if lengths == (2, 3):  # about half of them are in the window of their block
        assert 0.4 * products < count < 1.3 * products
    else:
        assert 0.25 * most < copies < 0.75 * most  # few are read there


@pytest.mark.parametrize(('depth', 'dtypes'), WIDTHS)
def test_gathered_units(emulator, tmp_path, depth, dtypes):
    """Units with one far tap in many rows, one of the two by which they are judged."""
    dtype = TYPES[dtypes][0]
    groups = slice_groups(depth, dtype)
    geometry = dict(kernel_size=3, padding=1)
    ways = []
    for far_rows in (2, 16):
        inputs, _ = make_call((1, 8, 16, groups, depth), TYPES[dtypes], geometry)
        scale_offsets(inputs, groups, 9, 0)
        packed = inputs.offset_mask[..., :27 * groups].unflatten(-1, (groups, 27))
        x, y = torch.meshgrid(torch.arange(16), torch.arange(8), indexing='xy')
        packed[:, (x + 4 * y) % 16 < far_rows // 2, :, 10] = 9.0
        _, _, accesses = check(emulator, tmp_path, inputs, groups=groups, count=True,
                               device=ONE_PROCESSOR, **geometry)
        ways.append(parts_taken(accesses))
        units = 8 * 16 * groups // 32
    assert ways == [{'product'}, {'gather'}]
    assert accesses['taps']['instructions'] == 27 * units  # weights, corners, step
    assert 'finish' not in accesses or accesses['finish']['instructions'] == 0
    # each tap of a row reads its numbers three times, and its corners at most four times
    team = depth * dtype.itemsize // 16
    assert 27 * team < accesses['far']['instructions'] / units <= 63 * team


@pytest.mark.parametrize(('depth', 'dtypes'), [(16, 'f16'), (32, 'f16'), (64, 'f16'), (16, 'f32')])
def test_no_conflicts_but_in_the_scatter(emulator, tmp_path, depth, dtypes):
    """Other group widths."""
    counts = accesses_per_unit(emulator, tmp_path, depth, dtypes, 0.3)
    assert counts['clear'] == (16, 64)
    assert counts['weights'] == (64, 64)
    assert counts['pixels'] == ((4 * depth, 4 * depth) if dtypes == 'f32' else
                                (depth / 2, 2 * depth))
    assert counts['collect'] == (depth / 2, depth)
    assert counts['finish'] == (depth / 4, depth)


def test_not_made_for(emulator, tmp_path):
    """The kernels say which calls are theirs; all others get a plan that is not made for them."""
    usual = dict(depth=16, kernel=3, stride=1, dilation=1, scale=1.0, softmax=0, dtype=2,
                 alignment=16)
    expected = [({}, 1), (dict(scale=-1.0), 1), (dict(dtype=3, depth=64), 1),
                (dict(dtype=1), 1), (dict(dtype=1, depth=32), 1), (dict(dtype=1, depth=64), 0)]
    expected += [({name: value}, 0) for name, value in
                 dict(depth=24, kernel=5, stride=2, dilation=2, softmax=1, dtype=0,
                      alignment=8).items()]
    # offsets that may lead out of the windows
    expected += [(dict(scale=scale, dtype=dtype), 0)
                 for scale in (1.001, -1.5, 2.0, 4.0) for dtype in (1, 2, 3)]
    expected = [({**change, 'backward': backward}, is_made_for) for backward in (0, 1)
                for change, is_made_for in expected]
    calls = []
    for change, _ in expected:
        c = {**usual, **change}
        pairs = ' '.join(f'{c[key]} {c[key]}' for key in ('kernel', 'stride'))
        calls.append(f'{c["alignment"]} {c["dtype"]} {c["backward"]} {" ".join(map(str, GPU))} '
                     f'2 9 11 3 {c["depth"]} {pairs} 1 1 {c["dilation"]} {c["dilation"]} '
                     f'{c["scale"]} 0 {c["softmax"]}')
    printed = emulator('cover', '\n'.join(calls))
    found = [json.loads(line)[1]['is_made_for'] for line in printed.splitlines()]
    assert found == [is_made_for for _, is_made_for in expected]
