# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Random legal calls of both operators against the float64 references, forward and backward.

python dev/reliability/properties.py [--cases 20000] [--seconds 3600] [--operator dcnv4]
"""

from __future__ import annotations

import random
import sys

import torch
from cases import parser, run
from torch import Tensor

from mmdcnv4.ops import (
    dcnv4,
    dcnv4_reference,
    multi_scale_deformable_attention,
    multi_scale_deformable_attention_reference,
)
from mmdcnv4.ops.contract import make_geometry, offset_mask_channels, output_size
from mmdcnv4.testing import (
    Inputs,
    assert_accurate,
    cpu_instruction_set,
    forward_backward,
    make_inputs,
    random_grad_output,
)

F64, F32, F16, BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
SETS = [name for name, flag in (('generic', ''), ('avx2', 'AVX2'), ('avx512', 'AVX512'))
        if flag in torch.backends.cpu.get_cpu_capability() or flag in ('', 'AVX2')]
# one group, a vector, vectors and a rest, several vectors, more than a kernel keeps in registers
DEPTHS = [1, 2, 3, 4, 7, 8, 12, 15, 16, 17, 31, 32, 33, 48, 64, 65, 100]


def dcnv4_geometry(draw: random.Random) -> tuple[dict, int, int]:
    """Arguments of a call, and the height and width of a map into which its kernel fits."""
    def pair(values: list[int]) -> tuple[int, int]:
        first = draw.choice(values)
        return (first, first) if draw.random() < 0.5 else (first, draw.choice(values))

    while True:
        geometry = dict(kernel_size=pair([1, 2, 3, 3, 3, 4, 5, 7]), groups=draw.choice(
            [1, 1, 2, 3, 4, 5]), stride=pair([1, 1, 1, 2, 3]), padding=pair([0, 1, 1, 2, 3]),
            dilation=pair([1, 1, 1, 2, 3]), offset_scale=draw.choice([1.0, 1.0, 0.5, 2.0, -1.25]),
            remove_center=draw.random() < 0.3, softmax=draw.random() < 0.3)
        height, width = draw.randint(1, 9), draw.randint(1, 9)
        try:
            rules = make_geometry(**geometry)
            out_h, out_w = output_size(height, width, rules)
        except ValueError:
            continue
        if out_h * out_w * rules.points * rules.groups <= 1500:
            return geometry, height, width


def relayout(draw: random.Random, tensor: Tensor) -> Tensor:
    """The same numbers in another layout: transposed, a slice, with gaps, contiguous."""
    kind = draw.randrange(4)
    if kind == 0:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if kind == 1:
        wide = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), float('nan'))
        wide[..., 1:-2] = tensor
        return wide[..., 1:-2]
    if kind == 2:
        tall = tensor.new_full((tensor.shape[0] * 2, *tensor.shape[1:]), float('nan'))
        tall[::2] = tensor
        return tall[::2]
    return tensor.contiguous()


def knots(draw: random.Random, batch: int, height: int, width: int, depth: int,
          geometry: dict) -> Inputs:
    """Offsets in eighths of a pixel: half of the samples lie on integers, where gradients jump."""
    rules = make_geometry(**geometry)
    out_h, out_w = output_size(height, width, rules)
    channels = offset_mask_channels(rules.groups, rules.points)
    generator = torch.Generator().manual_seed(draw.getrandbits(32))
    value = torch.randn(batch, height, width, depth * rules.groups, dtype=F64, generator=generator)
    mask = torch.randint(-24, 25, (batch, out_h, out_w, channels), generator=generator).to(F64) / 8
    whole = torch.rand(mask.shape, generator=generator) < 0.5
    return Inputs(value, torch.where(whole, mask.round(), mask))


def dcnv4_case(draw: random.Random) -> str:
    """One call of `dcnv4` with every number within its own bound of the float64 reference."""
    geometry, height, width = dcnv4_geometry(draw)
    batch, depth = draw.choice([0, 1, 1, 2, 3]), draw.choice(DEPTHS)
    dtype, mask_dtype = draw.choice([(F64, F64), (F32, F32), (F32, F32), (F16, F16), (F16, F32),
                                     (BF16, BF16), (BF16, F32)])
    on_knots = draw.random() < 0.4
    if on_knots:
        geometry['offset_scale'] = draw.choice([1.0, 0.5, 2.0])  # exact in every type
        inputs = Inputs(*(tensor.to(kind) for tensor, kind in zip(
            knots(draw, batch, height, width, depth, geometry), (dtype, mask_dtype))))
    else:
        inputs = make_inputs(batch, height, width, depth, dtype=dtype, mask_dtype=mask_dtype,
                             seed=draw.getrandbits(31), **geometry)
    grad = random_grad_output(inputs)
    inputs = Inputs(*(relayout(draw, tensor) for tensor in inputs))
    with cpu_instruction_set(draw.choice(SETS)):
        actual = forward_backward(dcnv4, inputs, relayout(draw, grad), backend='native',
                                  **geometry)
    assert_accurate(actual, inputs, grad, **geometry)
    return f'dcnv4 {str(dtype)[6:]}{" at knots" if on_knots else ""}'


def attention_case(draw: random.Random) -> str:
    """One call of the attention, against its PyTorch form in float64."""
    levels = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(draw.choice([1, 1, 2, 4]))]
    batch, queries = draw.choice([0, 1, 1, 2]), draw.choice([0, 1, 3, 7, 19])
    heads, depth, points = draw.choice([1, 2, 3, 8]), draw.choice(DEPTHS), draw.choice([1, 2, 4, 5])
    dtype = draw.choice([F64, F32, F32, F16, BF16])
    layout = (batch, queries, heads, len(levels), points)
    value = torch.randn(batch, sum(h * w for h, w in levels), heads, depth, dtype=F64).to(dtype)
    weights = torch.randn(layout, dtype=F64).to(dtype)
    # In eighths of a pixel plus 1/16: between the pixels in every type, also outside the map
    sides = torch.tensor([(w, h) for h, w in levels], dtype=F64)
    pixels = torch.stack([torch.randint(-16, 16, layout), torch.randint(-16, 16, layout)], -1)
    pixels = pixels.to(F64) / 8 + sides[:, None] / 2 + 1 / 16
    locations = (pixels / sides[:, None]).to(dtype)
    grad = torch.randn(batch, queries, heads * depth, dtype=F64).to(dtype)
    tensors = [relayout(draw, tensor).requires_grad_() for tensor in (value, locations, weights)]
    with cpu_instruction_set(draw.choice(SETS)):
        out = multi_scale_deformable_attention(tensors[0], levels, *tensors[1:], backend='native')
        found = [out, *torch.autograd.grad(out, tensors, grad)]
    wide = [tensor.detach().double().requires_grad_() for tensor in tensors]
    out = multi_scale_deformable_attention_reference(wide[0], levels, *wide[1:])
    right = [out, *torch.autograd.grad(out, wide, grad.double())]
    away = distance_from_knots(locations.double(), sides)
    unit = 2.0**{F64: -46, F32: -17, F16: -9, BF16: -6}[dtype]  # of the largest number of a tensor
    for name, tensor, exact in zip(('out', 'value', 'locations', 'weights'), found, right):
        assert tensor.dtype == dtype and tensor.isfinite().all(), name
        error = (tensor.detach().double() - exact.detach()).abs()
        if name == 'locations':  # the derivative jumps there, and rounding decides the side
            error = error * (away > 1e-5)[..., None]
        limit = unit * max(1.0, float(exact.detach().abs().max()) if exact.numel() else 1.0)
        assert not error.numel() or float(error.max()) <= limit, (name, float(error.max()), limit)
    return f'attention {str(dtype)[6:]}'


def distance_from_knots(locations: Tensor, sides: Tensor) -> Tensor:
    """How far a sample is from the next integer position, in pixels of its level."""
    pixels = locations * sides[:, None] - 0.5
    return (pixels - pixels.round()).abs().amin(-1)


def twice_the_same(draw: random.Random) -> str:
    """A repeated call gives the same bits, with any number of threads."""
    geometry, height, width = dcnv4_geometry(draw)
    inputs = make_inputs(2, height, width, draw.choice(DEPTHS), dtype=F32,
                         seed=draw.getrandbits(31), **geometry)
    grad = random_grad_output(inputs)
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(forward_backward(dcnv4, inputs, grad, backend='native', **geometry))
    torch.set_num_threads(1)
    assert all(map(torch.equal, *results))
    reference = forward_backward(dcnv4_reference, inputs, grad, **geometry)
    assert all(map(torch.isfinite, map(torch.sum, reference)))
    return 'dcnv4 repeated'


def main() -> int:
    """Runs the cases of one operator, or of both."""
    arguments = parser('Property tests of the operators.', 20000)
    arguments.add_argument('--operator', choices=['both', 'dcnv4', 'attention'], default='both')
    args = arguments.parse_args()
    kinds = {'dcnv4': [dcnv4_case] * 9 + [twice_the_same], 'attention': [attention_case]}
    kinds['both'] = kinds['dcnv4'] + kinds['attention'] * 7
    return run('properties', lambda draw: draw.choice(kinds[args.operator])(draw), args)


if __name__ == '__main__':
    sys.exit(min(main(), 1))
