# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention: by hand, against mmcv, gradients, borders, bad calls."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mmdcnv4.ops import (
    multi_scale_deformable_attention,
    multi_scale_deformable_attention_reference,
    use_backend,
)

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
# batch, queries, heads, channels of a head, points, sizes
SHAPES = {
    'one-of-all': (1, 1, 1, 1, 1, [(1, 1)]),
    'odd': (2, 7, 3, 5, 4, [(8, 9), (4, 5), (3, 1)]),
    'wide': (1, 11, 2, 33, 3, [(5, 4), (1, 6)]),
    'cameras': (3, 19, 4, 16, 8, [(12, 32), (6, 16), (3, 8), (2, 4)]),
    'plane': (2, 30, 8, 32, 8, [(6, 5)]),
    'very-wide': (1, 3, 1, 150, 1, [(2, 2), (3, 3)]),
}


def make_inputs(name, dtype=F64, seed=0):
    batch, queries, heads, channels, points, sizes = SHAPES[name]
    generator = torch.Generator().manual_seed(seed)
    pixels = sum(height * width for height, width in sizes)
    layout = (batch, queries, heads, len(sizes), points)
    value = torch.randn(batch, pixels, heads, channels, dtype=F64, generator=generator)
    # a third of the samples touches a border or lies outside
    locations = torch.rand(*layout, 2, dtype=F64, generator=generator) * 1.5 - 0.25
    weights = torch.randn(layout, dtype=F64, generator=generator)
    return [value.to(dtype), sizes, locations.to(dtype), weights.to(dtype)]


def leaves(inputs):
    value, sizes, locations, weights = inputs
    return [tensor.clone().requires_grad_() for tensor in (value, locations, weights)], sizes


def run(tensors, sizes, **options):
    return multi_scale_deformable_attention(tensors[0], sizes, *tensors[1:], **options)


def grads_of(inputs, **options):
    tensors, sizes = leaves(inputs)
    out = run(tensors, sizes, **options)
    generator = torch.Generator().manual_seed(1)
    seed = torch.randn(out.shape, dtype=F64, generator=generator).to(out.dtype)
    return [out, *torch.autograd.grad(out, tensors, seed)]


@pytest.mark.parametrize('backend', ['native', 'pytorch'])
def test_by_hand(backend, native):
    """A 2 x 3 map of 0 ... 5: a centre, between four, half across a border, a corner, outside."""
    value = torch.arange(6.0, dtype=F64).view(1, 6, 1, 1)
    pixels = torch.tensor([[1.0, 1], [0.5, 0.5], [2.5, 0], [-0.5, -0.5], [3.0, 0]], dtype=F64)
    locations = (pixels + 0.5) / torch.tensor([3.0, 2])
    out = multi_scale_deformable_attention(
        value, [(2, 3)], locations.view(1, 5, 1, 1, 1, 2), torch.full((1, 5, 1, 1, 1), 2.0,
                                                                      dtype=F64), backend=backend)
    assert out.flatten().tolist() == pytest.approx([8, 4, 2, 0, 0])
    # two samples of one query and of two levels add up
    out = multi_scale_deformable_attention(
        torch.cat([value, value + 10], 1), [(2, 3), (3, 2)],
        torch.full((1, 1, 1, 2, 1, 2), 0.5, dtype=F64),
        torch.tensor([1.0, 10], dtype=F64).view(1, 1, 1, 2, 1), backend=backend)
    assert out.item() == pytest.approx(2.5 + 10 * 12.5)


@pytest.mark.parametrize('name', SHAPES)
@pytest.mark.parametrize('dtype, tolerance', [(F64, 1e-12), (F32, 2e-5)])
def test_equals_mmcv(name, dtype, tolerance, instruction_set):
    ops = pytest.importorskip('mmcv.ops', reason='mmcv is not installed', exc_type=ImportError)
    mmcv_form = ops.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch
    inputs = make_inputs(name, dtype)
    tensors, sizes = leaves([inputs[0].double(), inputs[1], *(x.double() for x in inputs[2:])])
    expected = mmcv_form(tensors[0], sizes, *tensors[1:])
    generator = torch.Generator().manual_seed(1)
    seed = torch.randn(expected.shape, dtype=F64, generator=generator)
    wanted = [expected, *torch.autograd.grad(expected, tensors, seed.to(dtype).double())]
    for found, target in zip(grads_of(inputs, backend='native'), wanted):
        assert found.dtype == dtype
        scale = max(1.0, target.abs().max().item())
        torch.testing.assert_close(found.double(), target, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize('name', SHAPES)
def test_pytorch_form(name, native):
    for found, target in zip(grads_of(make_inputs(name), backend='pytorch'),
                             grads_of(make_inputs(name), backend='native')):
        torch.testing.assert_close(found, target, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize('name', ['odd', 'wide'])
def test_gradcheck(name, instruction_set):
    tensors, sizes = leaves(make_inputs(name))
    assert torch.autograd.gradcheck(lambda *x: run(x, sizes, backend='native'), tensors)


def test_gradcheck_of_the_pytorch_form_twice():
    tensors, sizes = leaves(make_inputs('one-of-all', seed=4))
    try:
        assert torch.autograd.gradgradcheck(lambda *x: run(x, sizes, backend='pytorch'), tensors)
    except RuntimeError as error:
        if 'grid_sampler_2d_backward is not implemented' not in str(error):
            raise
        pytest.skip('this torch differentiates grid_sample once')
    with pytest.raises(NotImplementedError, match='no double backward'):
        out = run(tensors, sizes, backend='native').sum()
        torch.autograd.grad(out, tensors, create_graph=True)[0].sum().backward()


@pytest.mark.parametrize('dtype', [F64, F32])
def test_opcheck(dtype, native):
    tensors, sizes = leaves(make_inputs('odd', dtype))
    flat = [side for size in sizes for side in size]
    torch.library.opcheck(torch.ops.mmdcnv4.ms_deform_attn.default, (*tensors, flat))
    grad = torch.randn(2, 7, 15, dtype=dtype)
    torch.library.opcheck(torch.ops.mmdcnv4._ms_deform_attn_backward.default,
                          (grad, *(x.detach() for x in tensors), flat))


def test_any_number_of_threads_gives_the_same_bits(native):
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(grads_of(make_inputs('cameras', F32), backend='native'))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_strides_do_not_matter(native):
    value, sizes, locations, weights = make_inputs('odd')
    expected = run((value, locations, weights), sizes)
    mixed = value.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
    torch.testing.assert_close(run((mixed, locations, weights), sizes), expected)
    one = weights[:, :1].expand_as(weights)
    torch.testing.assert_close(run((value, locations, one), sizes),
                               run((value, locations, one.contiguous()), sizes))


@pytest.mark.parametrize('dtype', [BF16, torch.float16])
def test_half_types_are_computed_in_float32(dtype, native):
    inputs = make_inputs('odd', dtype)
    wide = [inputs[0].float(), inputs[1], *(x.float() for x in inputs[2:])]
    found, target = grads_of(inputs), grads_of(wide)
    assert all(x.dtype == dtype for x in found)
    torch.testing.assert_close(found[0], target[0].to(dtype))
    with torch.autocast('cpu', dtype=BF16):
        assert torch.equal(grads_of(wide)[0], target[0])


def test_backend_and_meta(native):
    tensors, sizes = leaves(make_inputs('odd', F32))
    with use_backend('pytorch'):
        assert 'MsDeformAttn' not in type(run(tensors, sizes).grad_fn).__name__
    out = run([x.detach().to('meta').requires_grad_() for x in tensors], sizes)
    assert (out.shape, out.device.type) == ((2, 7, 15), 'meta')
    compiled = torch.compile(lambda *x: run(x, sizes), backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(compiled(*tensors), run(tensors, sizes))


# ------------------------------------------------------------------------------- hostile inputs


@pytest.mark.hostile
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf, 1e9, -1e9, 1e38, -1e38])
@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('dtype', [F32, F64])
def test_far_and_undefined_locations_count_as_zero(bad, axis, dtype, instruction_set):
    value, sizes, locations, weights = make_inputs('odd', dtype)
    hostile, quiet = locations.clone(), weights.clone()
    hostile[:, ::2, :, 1, 2, axis] = bad
    quiet[:, ::2, :, 1, 2] = 0
    expected = grads_of([value, sizes, locations, quiet])
    found = grads_of([value, sizes, hostile, weights])
    reference = grads_of([value, sizes, hostile, weights], backend='pytorch')
    for index in (0, 1):  # output, gradient of value
        torch.testing.assert_close(found[index], expected[index])
        torch.testing.assert_close(found[index], reference[index], atol=1e-4, rtol=1e-4)
    assert not found[2][:, ::2, :, 1, 2].any() and not found[3][:, ::2, :, 1, 2].any()
    torch.testing.assert_close(found[2][:, 1::2], expected[2][:, 1::2])


@pytest.mark.hostile
def test_a_pixel_that_is_not_sampled_is_not_read(instruction_set):
    value, sizes, locations, weights = make_inputs('cameras', F32)
    value[:, 12 * 32:12 * 32 + 6 * 16] = math.nan
    locations[:, :, :, 1] = -3
    assert all(tensor.isfinite().all() for tensor in grads_of([value, sizes, locations, weights]))


@pytest.mark.hostile
@pytest.mark.parametrize('size', [(2**30, 1), (1, 2**30)])
def test_the_longest_side(size, instruction_set):
    """4 GiB of virtual memory, of which a few pages are touched."""
    try:
        value = torch.from_numpy(np.zeros((1, 2**30, 1, 1), np.float32))
    except MemoryError:
        pytest.skip('no 4 GiB of address space')
    value[0, 2**30 - 64] = 3
    # 2^30 - 0.5 and 2^30 - 64.5 pixels, rounded to float32: just outside, and on that pixel
    locations = torch.tensor([[0.5, 1], [0.5, 1 - 2.0**-24], [0.5, 9], [0.5, math.nan]])
    if size[0] == 1:
        locations = locations.flip(-1)
    out = run((value, locations.view(1, 4, 1, 1, 1, 2), torch.ones(1, 4, 1, 1, 1)), [size],
              backend='native')
    assert out.flatten().tolist() == [0, 3, 0, 0]


@pytest.mark.hostile
@pytest.mark.parametrize('batch, queries', [(0, 5), (2, 0), (0, 0)])
def test_nothing_to_do(batch, queries, native):
    sizes = [(2, 3), (1, 1)]
    inputs = [torch.randn(batch, 7, 2, 4), sizes, torch.rand(batch, queries, 2, 2, 3, 2),
              torch.rand(batch, queries, 2, 2, 3)]
    for backend in ('native', 'pytorch'):
        out, grad, *_ = grads_of(inputs, backend=backend)
        assert out.shape == (batch, queries, 8) and not grad.any()


@pytest.mark.parametrize('backend', ['native', 'pytorch'])
def test_an_infinite_weight_outside_the_map_counts_nothing(backend, native):
    locations = torch.tensor([[0.5, 0.5], [3.0, 0.5], [0.5, -2.0]], dtype=F64)
    weights = torch.tensor([1.0, math.inf, math.nan], dtype=F64)
    out = multi_scale_deformable_attention(
        torch.ones(1, 6, 1, 1, dtype=F64), [(2, 3)], locations.view(1, 1, 1, 1, 3, 2),
        weights.view(1, 1, 1, 1, 3), backend=backend)
    assert out.item() == 1


@pytest.mark.parametrize('change, error, message', [
    (dict(value=torch.randn(2, 9, 3, 5)), ValueError, r'value must have shape \(B, 95'),
    (dict(value=torch.randn(95, 3, 5)), ValueError, 'value must have shape'),
    (dict(value=torch.ones(2, 95, 3, 5, dtype=torch.int64)), TypeError, 'value must be a tensor'),
    (dict(sizes=[]), ValueError, 'sizes must be'),
    (dict(sizes=[(8, 9), (4, 5), (0, 3)]), ValueError, 'sizes must be'),
    (dict(sizes=[(8, 9), (4, 5), (3.9, 1)]), TypeError, 'sizes must be .* in ints'),
    (dict(sizes=[(8, 9), (4, 5), ('3', 1)]), TypeError, 'sizes must be .* in ints'),
    (dict(sizes=[(8, 9), (4, 5), (3, True)]), TypeError, 'sizes must be .* in ints'),
    (dict(sizes=[(8, 9, 1)]), TypeError, 'sizes must be .* in ints'),
    (dict(sizes=None), TypeError, 'sizes must be .* in ints, got None'),
    (dict(value=torch.zeros(2, 95, 3, 5).to_sparse()), TypeError, 'value must be a dense tensor'),
    (dict(sizes=[(2**30 + 1, 1)]), ValueError, 'sizes must have sides <= 1073741824'),
    (dict(sizes=[(2**15, 2**16)]), ValueError, 'at most 2147483647 pixels together'),
    (dict(locations=torch.rand(2, 7, 3, 3, 4, 3)), ValueError, 'locations must have shape'),
    (dict(locations=torch.rand(2, 7, 3, 2, 4, 2)), ValueError, 'locations must have shape'),
    (dict(locations=torch.rand(2, 7, 3, 3, 0, 2)), ValueError, 'locations must have shape'),
    (dict(locations=None), TypeError, 'locations must be a tensor'),
    (dict(weights=torch.rand(2, 7, 3, 3, 5)), ValueError, 'weights must have shape'),
    (dict(weights=torch.rand(2, 7, 3, 3, 4, device='meta')), ValueError, 'weights must be on'),
    (dict(backend='cuda'), ValueError, 'backend must be'),
])
def test_bad_calls(change, error, message):
    names = ('value', 'sizes', 'locations', 'weights')
    arguments = {**dict(zip(names, make_inputs('odd', F32))), **change}
    with pytest.raises(error, match=message):
        multi_scale_deformable_attention(**arguments)


def test_the_operator_checks_too(native):
    """Without the Python function around it."""
    value, _, locations, weights = make_inputs('odd', F32)
    call = torch.ops.mmdcnv4.ms_deform_attn
    with pytest.raises(ValueError, match='the pixels of sizes'):
        call(value, locations, weights, [8, 9])
    with pytest.raises(ValueError, match='sizes must be'):
        call(value, locations, weights, [8, 9, 4])
    with pytest.raises(ValueError, match='sizes must have sides <= 1073741824'):
        call(value, locations, weights, [1, 2**30 + 1])  # 2^31 - 1 is no float32
    with pytest.raises(ValueError, match='at most 2147483647 pixels together'):
        call(value, locations, weights, [2**30, 1, 2**15, 2**15])
    with pytest.raises(TypeError, match='dtype of value'):
        call(value, locations.double(), weights, [8, 9, 4, 5, 3, 1])
    with pytest.raises(ValueError, match='weights must have shape'):
        call(value, locations, weights[:1], [8, 9, 4, 5, 3, 1])
    with pytest.raises(ValueError, match='grad_output must have shape'):
        torch.ops.mmdcnv4._ms_deform_attn_backward(
            torch.randn(2, 7, 14), value, locations, weights, [8, 9, 4, 5, 3, 1])


def test_reference_is_public():
    value, sizes, locations, weights = make_inputs('plane')
    torch.testing.assert_close(
        multi_scale_deformable_attention_reference(value, sizes, locations, weights),
        multi_scale_deformable_attention(value, sizes, locations, weights))
