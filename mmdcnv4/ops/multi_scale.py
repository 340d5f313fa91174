# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention: the function, its PyTorch form, and its compiled kernels.

Source:   "Deformable DETR", Zhu et al., ICLR 2021, arXiv:2010.04159, eq. (3).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _extension
from .contract import HALF_DTYPES
from .functional import Backend, get_backend

Sizes = Sequence[tuple[int, int]]
_NAME = 'multi_scale_deformable_attention'
# an extension that was built before this function has no kernels of it
_IS_COMPILED = _extension.is_available and hasattr(torch.ops.mmdcnv4, 'ms_deform_attn')
_LARGEST_SIDE, _MOST_PIXELS = 2**30, 2**31 - 1  # the kernels count pixels in 32 bits
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _check_tensors(value: Tensor, locations: Tensor, weights: Tensor) -> None:
    for name, tensor in (('value', value), ('locations', locations), ('weights', weights)):
        if not isinstance(tensor, Tensor) or tensor.dtype not in _FLOATS:
            raise TypeError(f'{_NAME}: {name} must be a tensor of float64, float32, float16 or '
                            f'bfloat16, got {getattr(tensor, "dtype", type(tensor).__name__)}')
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(f'{_NAME}: {name} must be a dense tensor, got '
                            f'{"a nested" if tensor.is_nested else f"a {tensor.layout}"} one')
        if tensor.device != value.device:
            raise ValueError(f'{_NAME}: {name} must be on the device of value ({value.device}), '
                             f'got {tensor.device}')


def _check(value: Tensor, sizes: Sizes, locations: Tensor, weights: Tensor) -> None:
    """Raises TypeError or ValueError; the message names argument, rule and value."""
    _check_tensors(value, locations, weights)
    if not sizes or any(len(size) != 2 or min(size) < 1 for size in sizes):
        raise ValueError(f'{_NAME}: sizes must be (height, width) of at least one level, all '
                         f'positive, got {sizes}')
    pixels = sum(height * width for height, width in sizes)
    if max(map(max, sizes)) > _LARGEST_SIDE or pixels > _MOST_PIXELS:
        raise ValueError(f'{_NAME}: sizes must have sides <= {_LARGEST_SIDE} and at most '
                         f'{_MOST_PIXELS} pixels together, got {sizes}')
    if value.dim() != 4 or value.shape[1] != pixels or 0 in value.shape[2:]:
        raise ValueError(f'{_NAME}: value must have shape (B, {pixels}, heads, channels), the '
                         f'pixels of sizes, got {tuple(value.shape)}')
    batch, _, heads, _ = value.shape
    levels = len(sizes)
    if locations.dim() != 6 or locations.shape[4] == 0 or (
            locations.shape[0], *locations.shape[2:4], locations.shape[5]) != (
                batch, heads, levels, 2):
        raise ValueError(f'{_NAME}: locations must have shape ({batch}, Q, {heads}, {levels}, '
                         f'points, 2), got {tuple(locations.shape)}')
    if weights.shape != locations.shape[:-1]:
        raise ValueError(f'{_NAME}: weights must have shape {tuple(locations.shape[:-1])}, that '
                         f'of locations without the last dimension, got {tuple(weights.shape)}')


def _pairs(sizes: Sizes) -> list[tuple[int, int]]:
    """The sizes as integers; a tensor of them, as other libraries pass it, included."""
    try:
        pairs = [(height, width) for height, width in sizes]
        sides = [(operator.index(height), operator.index(width)) for height, width in pairs]
        is_legal = not any(isinstance(side, bool) for size in pairs for side in size)
    except (TypeError, ValueError):
        is_legal = False
    if not is_legal:
        raise TypeError(f'{_NAME}: sizes must be (height, width) of every level in ints, got '
                        f'{sizes!r}')
    return sides


def multi_scale_deformable_attention_reference(value: Tensor, sizes: Sizes, locations: Tensor,
                                               weights: Tensor) -> Tensor:
    """The PyTorch form; arguments as in the function without `_reference`.

    It keeps what it sampled, B * heads * D * Q * L * P values, for the backward pass. It is
    differentiable as often as `grid_sample` is.
    """
    heads = value.shape[2]
    # where a location is not finite or far away it is outside, whatever the size of the map
    locations = locations.nan_to_num(nan=-1.0).clamp(-1, 2)
    total = value.new_zeros(())
    maps = value.split([height * width for height, width in sizes], 1)
    for level, (height, width) in enumerate(sizes):
        # (B, h*w, M, D) -> (B*M, D, h, w)
        pixels = maps[level].flatten(2).transpose(1, 2).unflatten(1, (heads, -1)).flatten(0, 1)
        pixels = pixels.unflatten(2, (height, width))
        grid = 2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1  # (B*M, Q, P, 2)
        samples = F.grid_sample(pixels, grid, align_corners=False)  # (B*M, D, Q, P)
        factors = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        sides = grid.new_tensor([width, height])
        pixel = ((grid.detach() + 1) * sides - 1) / 2
        # an infinite weight counts nothing where its sample is outside: inf * 0 is NaN
        inside = ((pixel > -1) & (pixel < sides)).all(-1)[:, None]
        factors = torch.where(inside, factors, factors.new_zeros(()))
        total = total + (samples * factors).sum(-1)  # (B*M, D, Q)
    return total.unflatten(0, (-1, heads)).flatten(1, 2).transpose(1, 2).contiguous()


def has_multi_scale_kernel(device_type: str) -> bool:
    """Whether tensors on this kind of device ('cpu', 'cuda') take compiled kernels."""
    return _IS_COMPILED and device_type in (*_extension.build_info, 'meta')


def _of_kernels(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors in types that the kernels take, see the Numerics of the function.

    On a GPU they read half values as they are, with locations and weights of the same type or of
    float32; those of any other type become float32.
    """
    dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
    if value.is_cuda and value.dtype in HALF_DTYPES:
        kept = (value.dtype, torch.float32)
        locations, weights = (tensor if tensor.dtype in kept else tensor.to(dtype)
                              for tensor in (locations, weights))
        return value, locations, weights
    return value.to(dtype), locations.to(dtype), weights.to(dtype)


def multi_scale_deformable_attention(value: Tensor, sizes: Sizes, locations: Tensor,
                                     weights: Tensor, *,
                                     backend: Optional[Backend] = None) -> Tensor:
    """Samples maps of several sizes at given points and sums the samples of each query and head.

    For query q and head m::

        out[b, q, m, :] = sum_lp  weights[b, q, m, l, p] * bilinear(value_l[b, :, :, m, :], x, y)
        x = locations[b, q, m, l, p, 0] * width_l - 0.5

    and likewise for y; pixel centres are on the integers. Pixels outside a map count as zero, and
    a sample whose location is NaN or infinite does too.

    Args:
        value: the maps, flattened and one after another. Shape (B, sum of H_l * W_l, heads, D).
        sizes: (H_l, W_l) of the L levels.
        locations: x, y in widths and heights of the map. Shape (B, Q, heads, L, P, 2).
        weights: factors of the samples, used as they are. Shape (B, Q, heads, L, P).
        backend: 'native' (compiled kernels), 'pytorch' or 'auto'; None follows
            :func:`mmdcnv4.ops.use_backend`, then the environment variable MMDCNV4_BACKEND.

    Returns:
        Shape (B, Q, heads * D), dtype of `value`.

    Raises:
        TypeError, ValueError: an argument breaks the rules above; the message names it.
        NotImplementedError: `backend='native'` and no kernel exists for the device.

    Numerics:
        float64 in float64, all other types in float32; gradients have the types of the arguments.
        The kernels keep nothing but the arguments for the backward pass. Those of the CPU are
        bitwise repeatable for any number of threads. On a GPU the gradient of `value` is not, but
        under `torch.use_deterministic_algorithms(True)`, for any input. There, half values are
        read as they are; float32 locations beside them keep their digits: on a map 200 pixels wide
        those of float16 go in steps of a tenth of a pixel, those of bfloat16 of almost one.

    Example:
        >>> value = torch.randn(2, 8 * 8 + 4 * 4, 4, 16)
        >>> locations, weights = torch.rand(2, 10, 4, 2, 3, 2), torch.rand(2, 10, 4, 2, 3)
        >>> sizes = [(8, 8), (4, 4)]
        >>> multi_scale_deformable_attention(value, sizes, locations, weights).shape
        torch.Size([2, 10, 64])
    """
    chosen: str = get_backend() if backend is None else backend
    if chosen not in ('auto', 'native', 'pytorch'):
        raise ValueError(f"{_NAME}: backend must be 'auto', 'native' or 'pytorch', got "
                         f'{chosen!r}')
    sizes = _pairs(sizes)
    _check(value, sizes, locations, weights)
    reason = None if has_multi_scale_kernel(value.device.type) else (
        _extension.missing_reason or f'no kernel was compiled for {value.device.type} tensors')
    if chosen == 'native' and reason is not None:
        raise NotImplementedError(f"{_NAME}: backend='native' is not possible: {reason}")
    if chosen == 'pytorch' or reason is not None:
        if chosen != 'pytorch' and not torch.compiler.is_compiling():
            _extension.warn_once(reason or '')
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        wide = value.to(dtype), locations.to(dtype), weights.to(dtype)
        with torch.autocast(value.device.type, enabled=False):
            out = multi_scale_deformable_attention_reference(wide[0], sizes, *wide[1:])
    else:
        flat = [side for size in sizes for side in size]
        out = torch.ops.mmdcnv4.ms_deform_attn(*_of_kernels(value, locations, weights), flat)
    return out.to(value.dtype)


def _fake_forward(value: Tensor, locations: Tensor, weights: Tensor,
                  sizes: Sequence[int]) -> Tensor:
    _check(value, list(zip(sizes[::2], sizes[1::2])), locations, weights)
    return value.new_empty((*locations.shape[:2], value.shape[2] * value.shape[3]))


def _fake_backward(grad_output: Tensor, value: Tensor, locations: Tensor, weights: Tensor,
                   sizes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    return (value.new_empty(value.shape), locations.new_empty(locations.shape),
            weights.new_empty(weights.shape))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.sizes = inputs[3]


def _backward(ctx: Any, grad_output: Tensor) -> tuple:
    grads = torch.ops.mmdcnv4._ms_deform_attn_backward(grad_output, *ctx.saved_tensors, ctx.sizes)
    return (*grads, None)


def _double_backward(ctx: Any, *grads: Tensor) -> tuple:
    raise NotImplementedError(f'{_NAME}: the compiled kernels have no double backward; use '
                              "backend='pytorch', whose gradients are differentiable")


if _IS_COMPILED:
    torch.library.register_fake('mmdcnv4::ms_deform_attn', _fake_forward)
    torch.library.register_fake('mmdcnv4::_ms_deform_attn_backward', _fake_backward)
    torch.library.register_autograd('mmdcnv4::ms_deform_attn', _backward,
                                    setup_context=_setup_context)
    torch.library.register_autograd('mmdcnv4::_ms_deform_attn_backward', _double_backward)
