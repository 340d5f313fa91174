# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Random hostile calls of both operators: each is refused in words, or gives a right answer.

python dev/reliability/hostile.py [--cases 20000] [--seconds 3600]

Also runs on the build of dev/sanitize.sh (docs/reliability.md says how).
"""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import numpy as np
import torch
from cases import parser, run
from torch import Tensor

from mmdcnv4.ops import dcnv4, multi_scale_deformable_attention
from mmdcnv4.ops.contract import make_geometry, offset_mask_channels, output_size

NUMBERS = [-2**63, -2**31, -1, 0, 1, 2, 3, 7, 1024, 1025, 2**30, 2**30 + 1, 2**31, 2**62, 2**63]
NO_NUMBERS = [None, '3', 3.0, 1.5, math.nan, True, [], {}, (1,), (1, 2, 3), b'1', object(),
              np.int64(3), np.float64(1.5), np.array([1, 2]), torch.tensor(2), 1j]
FLOATS = [0.0, -0.0, 1e-45, 1e-300, 1e30, 3e38, 1e300, math.inf, -math.inf, math.nan]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.bool,
          torch.complex64, torch.uint8, torch.float8_e4m3fn]
LIMIT = 2**22  # bytes of a tensor that is really allocated


def poisoned(draw: random.Random, tensor: Tensor) -> Tensor:
    """Some numbers are replaced by the ends of the range, infinities and NaN."""
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor
    flat = tensor.flatten()
    for _ in range(draw.randint(1, 8)):
        value = draw.choice(FLOATS)
        flat[draw.randrange(flat.numel())] = torch.tensor(value, dtype=torch.float64).to(flat.dtype)
    return flat.view(tensor.shape)


def tensor_of(draw: random.Random, shape: tuple, dtype: torch.dtype) -> Any:
    """A tensor of about this shape and type, and of some layout and content."""
    if draw.random() < 0.06:
        dtype = draw.choice(DTYPES)
    if draw.random() < 0.02:
        return draw.choice(NO_NUMBERS)
    shape = list(shape)
    if draw.random() < 0.06 and shape:
        axis = draw.randrange(len(shape))
        shape[axis] = max(0, draw.choice([0, 1, shape[axis] + 1, shape[axis] - 1]))
    if draw.random() < 0.02:
        shape = shape[:-1] if draw.random() < 0.5 else [1, *shape]
    kind = draw.random()
    if kind < 0.04:
        return torch.zeros((), dtype=dtype).expand(shape)  # every element the same memory
    if kind < 0.06:
        return torch.empty(shape, dtype=dtype, device='meta')
    if kind < 0.07:
        return torch.zeros(shape).to_sparse()
    if kind < 0.09 and shape:  # far more elements than memory; no output may be made of it
        shape[draw.randrange(len(shape))] = draw.choice([2**20, 2**31, 2**40])
        try:
            return torch.zeros((), dtype=dtype).expand(shape)
        except RuntimeError:
            return torch.zeros((), dtype=dtype)
    tensor = torch.randn(shape).mul(draw.choice([1, 3, 1e6, 1e30])).to(dtype)
    tensor = poisoned(draw, tensor) if draw.random() < 0.7 else tensor
    if draw.random() < 0.2 and tensor.dim() > 1:
        tensor = tensor.transpose(0, 1).contiguous().transpose(0, 1)
    return tensor


def is_affordable(*arguments: Any) -> bool:
    """Whether a call that is legal would fit into a small memory."""
    return all(not isinstance(item, Tensor) or item.is_meta or item.numel() * 8 <= LIMIT
               for item in arguments)


def value_or(draw: random.Random, legal: Any, likely: float = 0.85) -> Any:
    """The legal value, or something else."""
    if draw.random() < likely:
        return legal
    pool = draw.choice([NUMBERS, NO_NUMBERS, FLOATS])
    item = draw.choice(pool)
    return [item, draw.choice(NUMBERS)] if draw.random() < 0.2 else item


def backward(out: Tensor, draw: random.Random, *inputs: Any) -> None:
    """A backward pass with a hostile gradient."""
    grad = poisoned(draw, torch.randn(out.shape).to(out.dtype)) if not out.is_meta else \
        torch.empty_like(out)
    found = torch.autograd.grad(out, [x for x in inputs if x.requires_grad], grad)
    assert all(tensor is not None for tensor in found)
    for tensor, source in zip(found, [x for x in inputs if x.requires_grad]):
        assert tensor.shape == source.shape and tensor.dtype == source.dtype


def call(draw: random.Random, function: Any, tensors: list, **arguments: Any) -> str:
    """Calls; any TypeError or ValueError of ours names the argument, nothing else is raised."""
    for tensor in tensors:
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.is_sparse \
                and tensor.dtype != torch.float8_e4m3fn:
            tensor.requires_grad_(draw.random() < 0.9)
    try:
        out = function(*tensors, **arguments)
    except (TypeError, ValueError) as error:
        text = str(error)
        assert text.startswith(('dcnv4: ', 'multi_scale_deformable_attention: ')), text
        assert ' must ' in text, text
        return f'{text.split(":")[0]} refused'
    except NotImplementedError as error:
        assert "backend='native' is not possible" in str(error), error
        return 'no kernel'
    if out.requires_grad and out.grad_fn is not None:
        backward(out, draw, *tensors)
    if out.dtype == torch.float64 and not out.is_meta:
        compare(out, function(*tensors, **dict(arguments, backend='pytorch')))
        return f'{function.__name__} answered, compared'
    return f'{function.__name__} answered'


def compare(found: Tensor, right: Tensor) -> None:
    """Both backends agree on what is finite, and on its value."""
    ordinary = right.isfinite() & (right.abs() < 1e250)  # further up a sum may overflow or not
    assert bool((found.isfinite() | ~ordinary).all()), 'not finite, but should be'
    assert bool((right.isfinite() | ~found.isfinite() | (found.abs() > 1e250)).all()), 'finite'
    scale = float(right[ordinary].abs().max()) if ordinary.any() else 0.0
    error = (found - right)[ordinary].abs()
    assert not error.numel() or float(error.max()) <= 1e-9 * max(1.0, scale), float(error.max())


def dcnv4_call(draw: random.Random) -> str:
    """A call of `dcnv4` with a few arguments that are not what they should be."""
    legal = dict(kernel_size=draw.choice([1, 2, 3, (3, 1), [5, 3]]), groups=draw.choice([1, 2, 3]),
                 stride=draw.choice([1, 2, (1, 3)]), padding=draw.choice([0, 1, 2]),
                 dilation=draw.choice([1, 2]), offset_scale=draw.choice([1.0, 0.5, -3.0]),
                 remove_center=False, softmax=draw.random() < 0.3)
    height, width, depth = draw.randint(1, 7), draw.randint(1, 7), draw.choice([1, 4, 16, 33])
    shape = (draw.choice([1, 2]), 1, 1, 1)
    try:
        rules = make_geometry(**legal)
        shape = (shape[0], *output_size(height, width, rules),
                 offset_mask_channels(rules.groups, rules.points))
    except ValueError:
        pass
    dtype = draw.choice(DTYPES[:4])
    value = tensor_of(draw, (shape[0], height, width, depth * legal['groups']), dtype)
    mask = tensor_of(draw, shape, dtype)
    arguments = {name: value_or(draw, item, 0.97) for name, item in legal.items()}
    backend = draw.choice([None, None, 'native', 'native', 'pytorch', 'auto'])
    if not is_affordable(value, mask) or not is_small(value, arguments):
        arguments['offset_scale'] = math.nan  # is refused before anything is allocated
    return call(draw, dcnv4, [value, mask], backend=backend, **arguments)


def is_small(value: Any, arguments: dict) -> bool:
    """Whether a legal output of these arguments is small; padding may make it huge."""
    try:
        rules = make_geometry(**arguments)
        out_h, out_w = output_size(value.shape[1], value.shape[2], rules)
        return out_h * out_w * rules.points * rules.groups <= 2**16
    except (TypeError, ValueError, AttributeError, IndexError):
        return True


def attention_call(draw: random.Random) -> str:
    """A call of the attention with a few arguments that are not what they should be."""
    levels = [(draw.randint(1, 6), draw.randint(1, 6)) for _ in range(draw.choice([1, 2, 3]))]
    batch, queries, heads, depth, points = (draw.choice(x) for x in (
        [0, 1, 2], [0, 1, 5], [1, 2, 4], [1, 8, 33], [1, 3]))
    layout = (batch, queries, heads, len(levels), points)
    dtype = draw.choice(DTYPES[:4])
    value = tensor_of(draw, (batch, sum(h * w for h, w in levels), heads, depth), dtype)
    locations, weights = (tensor_of(draw, shape, dtype) for shape in ((*layout, 2), layout))
    sizes: Any = levels
    if draw.random() < 0.2:
        sizes = [tuple(value_or(draw, side, 0.7) for side in size) for size in levels]
    elif draw.random() < 0.05:
        sizes = draw.choice([*NO_NUMBERS, torch.tensor(levels), np.array(levels), levels * 2])
    if not is_affordable(value, locations, weights):
        sizes = []
    backend = draw.choice([None, None, None, 'native', 'native', 'pytorch', 'cuda'])
    return call(draw, attention, [value, locations, weights], sizes=sizes, backend=backend)


def attention(value: Any, locations: Any, weights: Any, *, sizes: Any, backend: Any) -> Tensor:
    """The function with its tensors first."""
    return multi_scale_deformable_attention(value, sizes, locations, weights, backend=backend)


def main() -> int:
    """Runs the calls."""
    args = parser('Hostile calls of the operators.', 20000).parse_args()
    return run('hostile', lambda draw: dcnv4_call(draw) if draw.random() < 0.7 else
               attention_call(draw), args)


if __name__ == '__main__':
    sys.exit(min(main(), 1))
