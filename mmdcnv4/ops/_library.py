# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Connects autograd, shape inference and autocast to `torch.ops.mmdcnv4.dcnv4`.

The schema and the kernels are C++ (`csrc/`); the dispatcher joins the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _extension
from .contract import Pair, check_tensors, make_geometry

# The scalars of the schema, in its order, after `value` and `offset_mask`.
_SCALARS = ('kernel_size', 'groups', 'stride', 'padding', 'dilation', 'offset_scale',
            'remove_center', 'softmax')


def is_autocast_on(device_type: str) -> bool:
    """Whether an autocast region for this kind of device is open."""
    # torch.compile of torch 2.4 cannot trace through the question whether a device has autocast
    has_autocast = device_type in ('cpu', 'cuda') or torch.amp.is_autocast_available(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


def cast_to_autocast(value: Tensor, offset_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Autocast policy of the operator, for the compiled and for the PyTorch path.

    `value` goes to the autocast dtype; float64 stays. `offset_mask` keeps float32, which holds
    sub-pixel positions a half type cannot, or follows `value`.
    """
    dtype = torch.get_autocast_dtype(value.device.type)
    if value.dtype != torch.float64:
        value = value.to(dtype)
    if offset_mask.dtype not in (torch.float32, torch.float64):
        offset_mask = offset_mask.to(value.dtype)
    return value, offset_mask


def _check(value: Tensor, offset_mask: Tensor, scalars: tuple) -> Pair:
    return check_tensors(value, offset_mask, make_geometry(**dict(zip(_SCALARS, scalars))))


def _fake_forward(value: Tensor, offset_mask: Tensor, *scalars: Any) -> Tensor:
    out_h, out_w = _check(value, offset_mask, scalars)
    return value.new_empty((value.shape[0], out_h, out_w, value.shape[3]))


def _fake_backward(grad_output: Tensor, value: Tensor, offset_mask: Tensor,
                   *scalars: Any) -> tuple[Tensor, Tensor]:
    _check(value, offset_mask, scalars)
    return value.new_empty(value.shape), offset_mask.new_empty(offset_mask.shape)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.scalars = inputs[2:]


def _backward(ctx: Any, grad_output: Tensor) -> tuple:
    value, offset_mask = ctx.saved_tensors
    grad_value, grad_offset_mask = torch.ops.mmdcnv4._dcnv4_backward(
        grad_output, value, offset_mask, *ctx.scalars)
    return (grad_value, grad_offset_mask, *(None for _ in ctx.scalars))


def _double_backward(ctx: Any, *grads: Tensor) -> tuple:
    raise NotImplementedError("dcnv4: the compiled kernels have no double backward; use "
                              "backend='pytorch', whose gradients are differentiable")


def _autocast_kernel(device_type: str, key: torch._C.DispatchKey) -> Any:
    keyset = torch._C.DispatchKeySet(key)

    def kernel(value: Tensor, offset_mask: Tensor, *scalars: Any) -> Tensor:
        value, offset_mask = cast_to_autocast(value, offset_mask)
        with torch._C._ExcludeDispatchKeyGuard(keyset):
            return torch.ops.mmdcnv4.dcnv4(value, offset_mask, *scalars)

    return kernel


if _extension.is_available:
    torch.library.register_fake('mmdcnv4::dcnv4', _fake_forward)
    torch.library.register_fake('mmdcnv4::_dcnv4_backward', _fake_backward)
    torch.library.register_autograd('mmdcnv4::dcnv4', _backward, setup_context=_setup_context)
    torch.library.register_autograd('mmdcnv4::_dcnv4_backward', _double_backward)
    _library = torch.library.Library('mmdcnv4', 'IMPL')
    for _device, _key in (('cpu', 'AutocastCPU'), ('cuda', 'AutocastCUDA')):
        _library.impl('dcnv4', _autocast_kernel(_device, getattr(torch._C.DispatchKey, _key)), _key)
