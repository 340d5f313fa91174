# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Help for tests and benchmarks: tolerances, small inputs, a second formulation, seeds.

Nothing else in the package imports this module.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import dcnv4_reference, offset_mask_channels, output_size
from .ops.contract import Geometry, IntOrPair, make_geometry

# Largest error, as a fraction of the largest exact number, that is always allowed.
# float64: only the order of sums differs. Others: a few roundings of the type; on top of it comes
# twice the error that the reference makes in that type (see `assert_as_accurate`).
TOLERANCE_FLOOR = {
    torch.float64: 1e-10,
    torch.float32: 4 * 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}

# Geometries that are never square and never symmetric, and the usual ones. `dcnv4` arguments.
GEOMETRIES: dict[str, dict[str, Any]] = {
    '3x3': dict(kernel_size=3, padding=1),
    '3x3-strided': dict(kernel_size=3, stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    '3x3-ring': dict(kernel_size=3, padding=(1, 2), offset_scale=0.5, remove_center=True),
    '3x3-softmax': dict(kernel_size=3, padding=(2, 1), dilation=(2, 1), offset_scale=2.0,
                        softmax=True),
    '1x1': dict(kernel_size=1, stride=(1, 2)),
    '5x5': dict(kernel_size=5, padding=(1, 2), dilation=(1, 1), offset_scale=1.5),
    '1x9': dict(kernel_size=(1, 9), padding=(0, 4), stride=(2, 1)),
    '3x5-ring': dict(kernel_size=(3, 5), padding=(0, 3), dilation=(2, 1), remove_center=True,
                     softmax=True),
    '2x4': dict(kernel_size=(2, 4), padding=(1, 1), dilation=(3, 1)),
}


class Inputs(NamedTuple):
    """Tensors of one `dcnv4` call."""

    value: Tensor
    offset_mask: Tensor

    def leaves(self, value_dtype: torch.dtype, mask_dtype: torch.dtype) -> Inputs:
        """Copies that ask for gradients."""
        return Inputs(self.value.detach().to(value_dtype, copy=True).requires_grad_(),
                      self.offset_mask.detach().to(mask_dtype, copy=True).requires_grad_())


def make_inputs(batch: int, height: int, width: int, group_channels: int, *, groups: int,
                dtype: torch.dtype = torch.float64, mask_dtype: Optional[torch.dtype] = None,
                reach: int = 3, seed: int = 0, **geometry: Any) -> Inputs:
    """Random inputs whose samples lie between the pixels, also far outside the map.

    Every sampling position keeps a distance of 0.1 pixel from the integers, where gradients have
    kinks, so that gradients can be compared across dtypes and with finite differences.

    Args:
        batch, height, width, group_channels, groups: N, H, W, D, G.
        dtype, mask_dtype: of `value` and of `offset_mask` (default: the same). The numbers are
            drawn in float64 and rounded, so that all dtypes get the same problem.
        reach: samples lie within this many pixels of the centre of their window.
        seed: of the private generator.
        geometry: the other arguments of :func:`mmdcnv4.ops.dcnv4`.
    """
    rules = make_geometry(groups=groups, **geometry)
    out_h, out_w = output_size(height, width, rules)
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = dict(generator=generator, dtype=torch.float64)
    value = torch.randn(batch, height, width, groups * group_channels, **options)
    padded = offset_mask_channels(groups, rules.points)
    offset_mask = torch.randn(batch, out_h, out_w, padded, **options)  # padding: not zero either
    shape = (batch, out_h, out_w, groups, rules.points, 2)
    between = torch.rand(shape, **options) * 0.8 + 0.1
    whole = torch.randint(-reach, reach, shape, generator=generator)
    offset = (between + whole) / rules.offset_scale - _taps(rules)
    used = offset_mask[..., :groups * 3 * rules.points].unflatten(-1, (groups, -1))
    used[..., :2 * rules.points] = offset.flatten(-2)
    return Inputs(value.to(dtype), offset_mask.to(mask_dtype or dtype))


def _taps(rules: Geometry) -> Tensor:
    """Resting position (x, y) of every tap around the centre of the window, before scaling."""
    return torch.tensor([[i * rules.dilation[1] - rules.center[1],
                          j * rules.dilation[0] - rules.center[0]] for j, i in rules.taps()],
                        dtype=torch.float64)


def dcnv4_grid_sample(value: Tensor, offset_mask: Tensor, *, kernel_size: IntOrPair, groups: int,
                      stride: IntOrPair = 1, padding: IntOrPair = 0, dilation: IntOrPair = 1,
                      offset_scale: float = 1.0, remove_center: bool = False,
                      softmax: bool = False) -> Tensor:
    """`dcnv4` by `torch.nn.functional.grid_sample`: the usual way to write it without a kernel.

    Arguments and result are those of :func:`mmdcnv4.ops.dcnv4`. On integer positions its offset
    gradients may be the left-hand derivatives, because normalised coordinates round.
    """
    rules = make_geometry(kernel_size=kernel_size, groups=groups, stride=stride, padding=padding,
                          dilation=dilation, offset_scale=offset_scale,
                          remove_center=remove_center, softmax=softmax)
    batch, height, width, channels = value.shape
    points, depth = rules.points, channels // groups
    out_h, out_w = output_size(height, width, rules)
    packed = offset_mask[..., :groups * 3 * points].unflatten(-1, (groups, 3 * points))
    packed = packed.permute(0, 3, 1, 2, 4).flatten(0, 1).flatten(1, 2)  # (N*G, Ho*Wo, 3K)
    offset, mask = packed[..., :2 * points].unflatten(-1, (points, 2)), packed[..., 2 * points:]
    if softmax:
        mask = mask.softmax(-1)
    rows = torch.arange(out_h) * rules.stride[0] - rules.padding[0] + rules.center[0]
    columns = torch.arange(out_w) * rules.stride[1] - rules.padding[1] + rules.center[1]
    base = torch.stack([columns.expand(out_h, -1), rows[:, None].expand(-1, out_w)], -1)
    base = base.reshape(-1, 1, 2).to(offset)  # (Ho*Wo, 1, 2) in (x, y)
    position = base + (_taps(rules).to(offset) + offset) * offset_scale
    size = position.new_tensor([width, height])
    grid = (2 * position + 1) / size - 1
    image = value.unflatten(-1, (groups, depth)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    sample = F.grid_sample(image, grid, 'bilinear', 'zeros', align_corners=False)
    out = (sample * mask[:, None]).sum(-1)  # (N*G, D, Ho*Wo)
    return out.view(batch, channels, out_h, out_w).permute(0, 2, 3, 1).contiguous()


def forward_backward(function: Callable[..., Tensor], inputs: Inputs, grad_output: Tensor,
                     **geometry: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradient of `value` and gradient of `offset_mask` of one call."""
    value, offset_mask = inputs.leaves(inputs.value.dtype, inputs.offset_mask.dtype)
    output = function(value, offset_mask, **geometry)
    grad_value, grad_offset_mask = torch.autograd.grad(output, (value, offset_mask),
                                                       grad_output.to(output.dtype))
    return output.detach(), grad_value, grad_offset_mask


def assert_as_accurate(actual: Tensor, reference: Tensor, exact: Tensor,
                       name: str = 'result') -> None:
    """Asserts that `actual` errs at most twice as much as `reference`, plus a floor.

    Args:
        actual: the result under test.
        reference: the reference in the same dtype, on the same inputs.
        exact: the reference in float64, on the same (rounded) inputs.
        name: for the message.
    """
    assert actual.shape == exact.shape and actual.dtype == reference.dtype, name
    if actual.numel() == 0:
        return
    exact = exact.double()
    error = (actual.double() - exact).abs().max().item()
    allowed = (2 * (reference.double() - exact).abs().max().item()
               + TOLERANCE_FLOOR[actual.dtype] * exact.abs().max().item())
    assert error <= allowed, f'{name}: error {error:.3e}, allowed {allowed:.3e}'


def assert_matches_reference(function: Callable[..., Tensor], inputs: Inputs,
                             **geometry: Any) -> None:
    """Compares output and both gradients of `function` with the reference."""
    out_h, out_w = inputs.offset_mask.shape[1:3]
    shape = (inputs.value.shape[0], out_h, out_w, inputs.value.shape[3])
    generator = torch.Generator().manual_seed(1)
    grad_output = torch.randn(shape, generator=generator, dtype=torch.float64)
    grad_output = grad_output.to(inputs.value.dtype)
    wide = inputs.leaves(torch.float64, torch.float64)
    actual = forward_backward(function, inputs, grad_output, **geometry)
    reference = forward_backward(dcnv4_reference, inputs, grad_output, **geometry)
    exact = forward_backward(dcnv4_reference, wide, grad_output, **geometry)
    names = ('output', 'grad_value', 'grad_offset_mask')
    for name, *tensors in zip(names, actual, reference, exact):
        assert_as_accurate(tensors[0], tensors[1], tensors[2], name)


@contextlib.contextmanager
def cpu_instruction_set(name: str) -> Iterator[None]:
    """Runs the block with one set of CPU kernels: 'generic', 'avx2' or 'avx512'."""
    torch.ops.mmdcnv4._set_cpu_instruction_set(name)
    try:
        yield
    finally:
        torch.ops.mmdcnv4._set_cpu_instruction_set('auto')


@contextlib.contextmanager
def fixed_seed(seed: int = 0) -> Iterator[None]:
    """Seeds Python, NumPy and torch, and restores their states afterwards."""
    import numpy
    states = random.getstate(), numpy.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(states[0])
            numpy.random.set_state(states[1])


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """Runs the block with `count` threads in torch's operators."""
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
