# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The drop-in for mmcv's MultiScaleDeformableAttention: equal numbers, alone and in detectors."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('mmcv.ops', reason='mmcv is not installed', exc_type=ImportError)

from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention
from mmengine.registry import HOOKS, MODELS

from mmdcnv4.models.layers import multi_scale_attention
from mmdcnv4.models.layers.multi_scale_attention import (
    MultiScaleAttention,
    use_multi_scale_attention,
)
from mmdcnv4.ops import (
    FlashDeformAttn,
    flash_deform_attn,
    multi_scale_deformable_attention,
)

SIZES = [(5, 7), (3, 2), (1, 1)]
PIXELS = sum(height * width for height, width in SIZES)
OPTIONS = dict(embed_dims=24, num_heads=3, num_levels=3, num_points=2, dropout=0.0)


def randomise(module):
    """Start values would make all weights equal."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module


def make_call(batch_first=True, corners=2, dtype=torch.float32):
    """query, value and the keywords of a call with padding."""
    query, value = torch.randn(2, 6, 24, dtype=dtype), torch.randn(2, PIXELS, 24, dtype=dtype)
    mask = torch.zeros(2, PIXELS, dtype=torch.bool)
    mask[1, ::3] = True
    if not batch_first:
        query, value = query.transpose(0, 1), value.transpose(0, 1)
    shapes = torch.tensor(SIZES)
    return dict(query=query, value=value, query_pos=torch.randn_like(query), key_padding_mask=mask,
                reference_points=torch.rand(2, 6, 3, corners, dtype=dtype), spatial_shapes=shapes,
                level_start_index=shapes.prod(1).cumsum(0) - shapes.prod(1))


def outputs_and_grads(module, call):
    call = {name: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor
            for name, tensor in call.items()}
    output = module(**call)
    inputs = [call['query'], call['value'], call['reference_points'], *module.parameters()]
    seed = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
    return [output, *torch.autograd.grad(output, inputs, seed)]


@pytest.mark.parametrize('batch_first', [True, False])
@pytest.mark.parametrize('corners', [2, 4])
def test_equals_mmcv(batch_first, corners):
    theirs = randomise(MultiScaleDeformableAttention(batch_first=batch_first, **OPTIONS))
    ours = MODELS.build(dict(type='MultiScaleAttention', batch_first=batch_first, **OPTIONS))
    ours.load_state_dict(theirs.state_dict())
    call = make_call(batch_first, corners)
    for found, target in zip(outputs_and_grads(ours, call), outputs_and_grads(theirs, call)):
        torch.testing.assert_close(found, target, atol=2e-5, rtol=2e-5)


def test_defaults_and_start_values_are_those_of_mmcv():
    """One tensor is query, value and identity; the residual sum is included."""
    ours = MultiScaleAttention(embed_dims=24, num_heads=3, num_levels=3, num_points=2)
    theirs = MultiScaleDeformableAttention(embed_dims=24, num_heads=3, num_levels=3, num_points=2)
    assert torch.equal(ours.sampling_offsets.bias, theirs.sampling_offsets.bias)
    theirs.load_state_dict(ours.state_dict())
    call = dict(reference_points=torch.rand(2, PIXELS, 3, 2), spatial_shapes=torch.tensor(SIZES),
                level_start_index=None)
    query = torch.randn(PIXELS, 2, 24)
    torch.testing.assert_close(ours.eval()(query, **call), theirs.eval()(query, **call))


@pytest.mark.parametrize('dtype, tolerance', [(torch.bfloat16, 0.03), (torch.float64, 1e-6)])
def test_other_types(dtype, tolerance):
    """bfloat16 runs natively: locations stay float32, though the linear layers round."""
    module = randomise(MultiScaleAttention(batch_first=True, **OPTIONS))
    call = make_call()
    expected = module(**call)
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor
            for name, tensor in call.items()}
    cast['reference_points'] = call['reference_points']
    found = copy.deepcopy(module).to(dtype)(**cast)
    assert found.dtype == dtype
    assert (found - expected).norm() < tolerance * expected.norm()
    with torch.autocast('cpu', torch.bfloat16):
        torch.testing.assert_close(module(**call), expected, atol=0.1, rtol=0.1)


def test_use_in_a_model():
    model = torch.nn.ModuleDict(dict(a=MultiScaleDeformableAttention(**OPTIONS),
                                     b=torch.nn.Sequential(MultiScaleAttention(**OPTIONS))))
    parameters = list(model.parameters())
    assert use_multi_scale_attention(model) == 2
    assert type(model['a']) is MultiScaleAttention
    assert all(a is b for a, b in zip(model.parameters(), parameters))


def test_the_hook():
    hook = HOOKS.build(dict(type='MultiScaleAttentionHook'))
    model = torch.nn.Sequential(MultiScaleDeformableAttention(**OPTIONS))
    hook.before_run(SimpleNamespace(model=model))
    assert type(model[0]) is MultiScaleAttention
    with pytest.raises(ValueError, match='must have a MultiScaleDeformableAttention'):
        hook.before_run(SimpleNamespace(model=torch.nn.Linear(1, 1)))


def test_sizes_are_read_once_and_anew_when_they_change():
    shapes = torch.tensor(SIZES)
    assert multi_scale_attention._read_sizes(shapes) is multi_scale_attention._read_sizes(shapes)
    shapes[0] = torch.tensor([9, 9])
    assert multi_scale_attention._read_sizes(shapes)[0] == (9, 9)
    with torch.inference_mode():
        shapes = torch.tensor(SIZES)
        assert multi_scale_attention._read_sizes(shapes)[0] == (5, 7)
        shapes[0] = 3
        assert multi_scale_attention._read_sizes(shapes)[0] == (3, 3)


def test_without_a_kernel_mmcv_computes(monkeypatch):
    module, call = randomise(MultiScaleAttention(batch_first=True, **OPTIONS)), make_call()
    expected = module(**call)
    monkeypatch.setattr(multi_scale_attention, 'has_multi_scale_kernel', lambda device: False)
    monkeypatch.setattr(multi_scale_attention, 'multi_scale_deformable_attention', None)
    torch.testing.assert_close(module(**call), expected)


@pytest.mark.parametrize('change, message', [
    (dict(spatial_shapes=torch.tensor([(5, 7), (3, 2), (2, 1)])), 'value must have shape'),
    (dict(reference_points=torch.rand(2, 6, 3, 3)), 'must have 2 or 4 numbers'),
    (dict(spatial_shapes=None), 'must be given')])
def test_bad_calls(change, message):
    module = MultiScaleAttention(batch_first=True, **OPTIONS)
    with pytest.raises(ValueError, match=message):
        module(**{**make_call(), **change})


# ---------------------------------------------------------------------- FlashDeformAttn


def test_packed_layout():
    """Locations, then logits; against the sum over levels and points written out."""
    value = torch.randn(2, PIXELS, 3, 8, dtype=torch.float64)
    locations = torch.rand(2, 5, 3, 3, 2, 2, dtype=torch.float64)
    logits = torch.randn(2, 5, 3, 6, dtype=torch.float64)
    packed = torch.cat([locations.flatten(3), logits], -1)
    weights = (logits.exp() / logits.exp().sum(-1, keepdim=True)).view(2, 5, 3, 3, 2)
    torch.testing.assert_close(
        flash_deform_attn(value, SIZES, packed, 2),
        multi_scale_deformable_attention(value, SIZES, locations, weights, backend='pytorch'))
    with pytest.raises(ValueError, match=r'\(B, Q, heads, 27\)'):
        flash_deform_attn(value, SIZES, packed, 3)


@pytest.mark.parametrize('corners', [2, 4])
def test_flash_module_equals_mmcv(corners):
    """The names of its parameters are those of the released module, and of mmcv's."""
    theirs = randomise(MultiScaleDeformableAttention(batch_first=True, **OPTIONS))
    ours = FlashDeformAttn(24, 3, 3, 2)
    assert torch.equal(ours.sampling_offsets.bias,
                       MultiScaleDeformableAttention(**OPTIONS).sampling_offsets.bias)
    ours.load_state_dict(theirs.state_dict())
    call = make_call(corners=corners)
    query = call['query'] + call['query_pos']
    torch.testing.assert_close(
        ours(query, call['reference_points'], call['value'], call['spatial_shapes'],
             call['level_start_index'], call['key_padding_mask']),
        theirs(**call) - call['query'], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match='2 or 4 numbers'):
        ours(query, torch.rand(2, 6, 3, 3), call['value'], call['spatial_shapes'])
    with pytest.raises(ValueError, match='n_heads must divide'):
        FlashDeformAttn(24, 3, 5)
