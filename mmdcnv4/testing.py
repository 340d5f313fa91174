# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Help for tests and benchmarks: tolerances, small inputs, a second formulation, seeds.

Nothing else in the package imports this module.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence
from typing import Any, Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import dcnv4_reference, offset_mask_channels, output_size
from .ops.contract import Geometry, IntOrPair, make_geometry
from .ops.reference import sampling_positions, split_offset_mask

# Largest relative error of one rounding.
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}
_SMALLEST_HALF = 2.0**-25  # half of the step between the smallest numbers of float16

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


def error_bounds(inputs: Inputs, grad_output: Tensor, *, weight_error: float = 0.0,
                 dot_error: float = 0.0, **geometry: Any) -> tuple[Tensor, Tensor, Tensor]:
    """How far output and gradients of any right implementation may be from the exact ones.

    To first order, for sums in any order. With u, one rounding of the type in which is computed,
    and with all sums over absolute values:

    - a sum of n products errs by at most (n + 3) u times the sum of their absolute values;
    - a position, (tap + offset) * scale + base, errs by p u with p = 3 |(tap + offset) * scale| +
      |position|, and thus each of the two weights of its axis by (p + 2) u;
    - a softmax mask errs by (2 R + K + 10) u of itself, R being the range of the K logits and 4 u
      allowed for an exponential.

    What is a difference in exact numbers (a derivative, a sample of pixels of both signs) is a sum
    here. Rounding the results to their own types is not included (see `assert_within`). Positions
    must not be closer to an integer than they err, unless they lie exactly on it.

    Args:
        inputs, grad_output: of the call, in the types of the call.
        weight_error: relative error of the bilinear weights times masks on top of it, for kernels
            that round them.
        dot_error: likewise of the products of `grad_output` and `value`, for kernels that do not
            multiply all of their bits.
        geometry: the other arguments of :func:`mmdcnv4.ops.dcnv4`.

    Returns:
        Bounds of the output, the gradient of value and that of offset_mask, in float64.
    """
    rules = make_geometry(**geometry)
    # the float64 reference errs as well
    u = 2 * UNIT_ROUNDOFF[torch.float64] if inputs.value.dtype == torch.float64 else (
        UNIT_ROUNDOFF[torch.float32])
    taps = _Taps.of(inputs, grad_output, rules, u)
    terms, depth = 4 * rules.points, inputs.value.shape[3] // rules.groups
    all4, by_x, by_y, full = taps.sums()
    relative = taps.mask_error + weight_error + (terms + 3) * u
    mask, (px, py) = taps.mask, taps.position_error
    output = taps.sum_taps(mask * relative, full) + taps.sum_taps(mask * px, by_x) + (
        taps.sum_taps(mask * py, by_y))

    grad_value = taps.scatter(relative - terms * u, px, py).reshape(inputs.value.shape)
    all4, by_x, by_y, full = (taps.dot(part) for part in (all4, by_x, by_y, full))
    scale = abs(rules.offset_scale) * mask
    dot = depth * u + dot_error
    grad_x = scale * ((dot + 4 * u) * by_x + (8 * u + py) * all4 + taps.mask_error * by_x)
    grad_y = scale * ((dot + 4 * u) * by_y + (8 * u + px) * all4 + taps.mask_error * by_y)
    grad_mask = dot * full + 8 * u * all4 + px * by_x + py * by_y
    if rules.softmax:
        # m_k (h_k - sum_j m_j h_j)
        mean = taps.over_taps(mask * grad_mask)
        size = full + taps.over_taps(mask * full)
        relative = 2 * taps.mask_error + (rules.points + 4) * u
        grad_mask = mask * (grad_mask + mean + relative * size)
    return output, grad_value, taps.pack(grad_x, grad_y, grad_mask, inputs.offset_mask)


class _Taps(NamedTuple):
    """Sizes of all that a call adds up: per sample (N, G, L = Ho * Wo * K), in float64."""

    inside: Tensor
    mask: Tensor  # absolute
    mask_error: Tensor  # relative
    position_error: tuple[Tensor, Tensor]  # of the weights of an axis, x and y
    corners: list[tuple[Tensor, Tensor, Tensor, Tensor]]  # pixel, exists, weight of x, of y
    value: Tensor  # (N, G, H * W, D), absolute
    grad: Tensor  # (N, G, Ho * Wo, D), absolute
    rules: Geometry
    u: float
    image: tuple[int, int]

    @classmethod
    def of(cls, inputs: Inputs, grad_output: Tensor, rules: Geometry, u: float) -> _Taps:
        batch, height, width, _ = inputs.value.shape
        out_h, out_w = inputs.offset_mask.shape[1:3]
        offset, mask = split_offset_mask(inputs.offset_mask.detach().double(), rules)
        x, y = sampling_positions(offset, rules, out_h, out_w)
        inside = (x > -1) & (x < width) & (y > -1) & (y < height)
        axes = [torch.where(inside, axis, 0) for axis in (x, y)]
        moves = ((_taps(rules).to(offset) + offset) * rules.offset_scale).abs().unbind(-1)
        errors = [torch.where(inside, 3 * move + axis.abs() + 2, 0) * u
                  for move, axis in zip(moves, axes)]
        mask_error = torch.zeros_like(mask)
        if rules.softmax:
            spread = mask.amax(-1, keepdim=True) - mask.amin(-1, keepdim=True)
            mask_error = mask_error + (2 * spread + rules.points + 10) * u
            mask = mask.softmax(-1)  # also of samples outside: they have gradients
        else:
            mask = torch.where(inside, mask.abs(), 0)

        def flat(tensor: Tensor) -> Tensor:
            return tensor.permute(0, 3, 1, 2, 4).flatten(2)

        corners = []
        lower = [axis.floor() for axis in axes]
        x, y = (axis - floor for axis, floor in zip(axes, lower))
        for dy, dx in ((0, 0), (0, 1), (1, 0), (1, 1)):
            column, line = lower[0] + dx, lower[1] + dy
            exists = inside & (column >= 0) & (column < width) & (line >= 0) & (line < height)
            pixel = torch.where(exists, line * width + column, 0).long()
            corners.append((flat(pixel), flat(exists), flat(x if dx else 1 - x),
                            flat(y if dy else 1 - y)))

        def grouped(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().double().abs().flatten(1, 2)
            return tensor.unflatten(-1, (rules.groups, -1)).transpose(1, 2)

        return cls(flat(inside), flat(mask), flat(mask_error), (flat(errors[0]), flat(errors[1])),
                   corners, grouped(inputs.value), grouped(grad_output), rules, u,
                   (out_h, out_w))

    def sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums over the corners of |value|, (N, G, L, D): as it is, and weighed with the weights
        that are left of the derivative by x and by y, and with both."""
        parts = []
        for pixel, exists, x, y in self.corners:
            corner = self.value.gather(2, pixel[..., None].expand(-1, -1, -1,
                                                                  self.value.shape[-1]))
            corner = torch.where(exists[..., None], corner, 0)
            parts.append((corner, y[..., None] * corner, x[..., None] * corner,
                          (x * y)[..., None] * corner))
        all4, by_x, by_y, full = (torch.stack(part).sum(0) for part in zip(*parts))
        return all4, by_x, by_y, full

    def over_taps(self, tensor: Tensor) -> Tensor:
        """Sums (N, G, L) over the taps of a row, and repeats the sum for each of them."""
        rows = tensor.unflatten(2, (-1, self.rules.points))
        return rows.sum(-1, keepdim=True).expand_as(rows).flatten(2)

    def sum_taps(self, factor: Tensor, part: Tensor) -> Tensor:
        """(N, G, L) * (N, G, L, D) -> (N, Ho, Wo, C)."""
        rows = (factor[..., None] * part).unflatten(2, (*self.image, self.rules.points)).sum(4)
        return rows.permute(0, 2, 3, 1, 4).flatten(3)

    def dot(self, part: Tensor) -> Tensor:
        """(N, G, L, D) -> (N, G, L): with |grad_output|."""
        rows = part.unflatten(2, (-1, self.rules.points))
        return (rows * self.grad[:, :, :, None]).sum(-1).flatten(2)

    def scatter(self, relative: Tensor, px: Tensor, py: Tensor) -> Tensor:
        """Bound of the gradient of value, (N, H * W, G, D); a pixel adds up as many terms as
        samples touch it."""
        absolute, size = torch.zeros_like(self.value), torch.zeros_like(self.value)
        count = torch.zeros_like(self.value[..., 0])
        points = self.rules.points
        for pixel, exists, x, y in self.corners:
            there = torch.where(exists, self.mask, 0)
            index = pixel[..., None].expand(-1, -1, -1, self.value.shape[-1])
            for total, factor in ((absolute, there * (relative * x * y + px * y + py * x)),
                                  (size, there * x * y)):
                rows = factor.unflatten(2, (-1, points))[..., None] * self.grad[:, :, :, None]
                total.scatter_add_(2, index, torch.where(exists[..., None], rows.flatten(2, 3), 0))
            count.scatter_add_(2, pixel, exists.double())
        return (absolute + self.u * count[..., None] * size).transpose(1, 2)

    def pack(self, grad_x: Tensor, grad_y: Tensor, grad_mask: Tensor, like: Tensor) -> Tensor:
        """The bounds (N, G, L) in the layout of offset_mask; a sample outside has gradient zero."""
        rows = [torch.where(self.inside, grad, 0).unflatten(2, (*self.image, self.rules.points))
                for grad in (grad_x, grad_y)]
        if not self.rules.softmax:
            grad_mask = torch.where(self.inside, grad_mask, 0)
        mask = grad_mask.unflatten(2, (*self.image, self.rules.points))
        packed = torch.cat([torch.stack(rows, -1).flatten(-2), mask], -1)
        packed = packed.permute(0, 2, 3, 1, 4).flatten(3)
        return F.pad(packed, (0, like.shape[3] - packed.shape[3]))


def assert_within(actual: Tensor, exact: Tensor, bound: Tensor, name: str = 'result') -> None:
    """Asserts that every number of `actual` is within its bound, plus one rounding to its type.

    Args:
        actual: the result under test.
        exact: the reference in float64, on the same (rounded) inputs. Where it is not finite,
            `actual` must not be finite either, and the other way round.
        bound: of :func:`error_bounds`.
        name: for the message.
    """
    assert actual.shape == exact.shape == bound.shape, name
    is_finite = exact.isfinite()
    assert torch.equal(actual.isfinite(), is_finite), f'{name}: other numbers are not finite'
    allowed = bound.to(exact.device)
    if actual.dtype != torch.float64:
        allowed = allowed + UNIT_ROUNDOFF[actual.dtype] * (exact.abs() + allowed)
    if actual.dtype == torch.float16:
        allowed = allowed + _SMALLEST_HALF
    error = (actual.double() - exact).abs()
    # not `error > allowed`: a bound that is NaN must not allow everything
    too_large = is_finite & ~(error <= allowed)
    if too_large.any():
        worst = torch.where(too_large, error / allowed, 0).nan_to_num(posinf=1e300).argmax()
        place = tuple(map(int, torch.unravel_index(worst, error.shape)))
        raise AssertionError(f'{name}: {int(too_large.sum())} of {error.numel()} numbers are too '
                             f'far off; at {place} the error is {error[place]:.3e}, allowed '
                             f'{allowed[place]:.3e}')


def assert_accurate(actual: Sequence[Optional[Tensor]], inputs: Inputs, grad_output: Tensor, *,
                    weight_error: float = 0.0, dot_error: float = 0.0,
                    **geometry: Any) -> tuple[Tensor, ...]:
    """Compares output, gradient of value, gradient of offset_mask (None: not computed) with the
    float64 reference, each number with its own bound (see :func:`error_bounds`).

    Returns:
        What the reference gives, the output alone where no gradient was computed.
    """
    wide = inputs.leaves(torch.float64, torch.float64)
    if all(tensor is None for tensor in actual[1:]):
        exact: tuple[Tensor, ...] = (dcnv4_reference(*wide, **geometry).detach(),)
    else:
        exact = forward_backward(dcnv4_reference, wide, grad_output, **geometry)
    bounds = error_bounds(inputs, grad_output, weight_error=weight_error, dot_error=dot_error,
                          **geometry)
    names = ('output', 'grad_value', 'grad_offset_mask')
    for name, tensor, right, bound in zip(names, actual, exact, bounds):
        if tensor is not None:
            assert_within(tensor, right, bound, name)
    return exact


def random_grad_output(inputs: Inputs) -> Tensor:
    """The same numbers for every call of one shape, in the type of value."""
    shape = (*inputs.offset_mask.shape[:3], inputs.value.shape[3])
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(inputs.value)


def assert_matches_reference(function: Callable[..., Tensor], inputs: Inputs,
                             **geometry: Any) -> None:
    """Compares output and both gradients of `function` with the float64 reference."""
    grad_output = random_grad_output(inputs)
    actual = forward_backward(function, inputs, grad_output, **geometry)
    for tensor, source in zip(actual, (inputs.value, *inputs)):
        assert tensor.dtype == source.dtype
    assert_accurate(actual, inputs, grad_output, **geometry)


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
