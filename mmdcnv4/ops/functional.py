# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The public function `dcnv4` and the choice of its backend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, Optional

import torch
from torch import Tensor

from . import _extension, _torch_internals
from .contract import (
    FLOAT_DTYPES,
    HALF_DTYPES,
    Geometry,
    IntOrPair,
    check_types,
    make_geometry,
)
from .reference import evaluate_reference

Backend = Literal['auto', 'native', 'pytorch']
_BACKENDS = ('auto', 'native', 'pytorch')
_COMPILED = ('auto', 'native')  # those that take the compiled kernels where they can
# read once: torch.compile of torch 2.4 cannot trace through os.environ
_from_environment: str = os.environ.get('MMDCNV4_BACKEND') or 'auto'
# Of `use_backend`, for each thread and each asynchronous task apart. torch.compile cannot trace a
# ContextVar, and a graph must not hold a choice that is over: tracing reads the variable of the
# module, which its guards watch.
_override: ContextVar[Optional[str]] = ContextVar('mmdcnv4_backend', default=None)
_override_of_traces: Optional[str] = None


def _checked_backend(backend: str, source: str) -> str:
    if backend not in _BACKENDS:
        raise ValueError(f'dcnv4: {source} must be one of {_BACKENDS}, got {backend!r}')
    return backend


def get_backend() -> str:
    """The backend in force: of `use_backend`, else of `MMDCNV4_BACKEND` at import, else 'auto'."""
    override = _override_of_traces if torch.compiler.is_compiling() else _override.get()
    if override is not None:
        return override
    return _checked_backend(_from_environment, 'MMDCNV4_BACKEND')


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Chooses the backend of every `dcnv4` call in the block that names none itself.

    Args:
        backend: 'native' (compiled kernels, an error without them), 'pytorch' (slow,
            differentiable twice, any device) or 'auto' (compiled kernels where there are some).
    """
    global _override_of_traces
    token = _override.set(_checked_backend(backend, 'backend'))
    _override_of_traces = backend
    try:
        yield
    finally:
        _override.reset(token)
        _override_of_traces = _override.get()


def _why_not_native(device_type: str) -> Optional[str]:
    """Why the compiled kernels cannot serve this call; None where they can."""
    if not _extension.is_available:
        return _extension.missing_reason
    if device_type not in (*_extension.build_info, 'meta'):
        return f'no kernel was compiled for {device_type} tensors'
    if torch.compiler.is_compiling():
        return None
    if _torch_internals.is_forward_mode():
        return 'they have no forward-mode derivative'
    if _torch_internals.is_gradient_transform():
        return 'they have no form for torch.func.grad, vjp and jacrev'
    return None


def _choose(backend: Optional[str], device_type: str) -> str:
    backend = get_backend() if backend is None else _checked_backend(backend, 'backend')
    reason = None if backend == 'pytorch' else _why_not_native(device_type)
    if backend == 'native' and reason is not None:
        raise NotImplementedError(f"dcnv4: backend='native' is not possible: {reason}")
    if backend == 'pytorch' or reason is not None:
        if reason is not None and not torch.compiler.is_compiling():
            _extension.warn_once(reason)
        return 'pytorch'
    return 'native'


def _is_autocast_on(device_type: str) -> bool:
    """Whether an autocast region for this kind of device is open."""
    # torch.compile of torch 2.4 cannot trace through the question whether a device has autocast
    has_autocast = device_type in ('cpu', 'cuda') or torch.amp.is_autocast_available(device_type)
    return has_autocast and torch.is_autocast_enabled(device_type)


def _cast_to_autocast(value: Tensor, offset_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Autocast policy of the operator, as `csrc/dcnv4_autograd.cpp` has it.

    `value` goes to the autocast dtype; float64 stays. `offset_mask` keeps float32, which holds
    sub-pixel positions a half type cannot, or follows `value`.
    """
    dtype = torch.get_autocast_dtype(value.device.type)
    if value.dtype != torch.float64:
        value = value.to(dtype)
    if offset_mask.dtype not in (torch.float32, torch.float64):
        offset_mask = offset_mask.to(value.dtype)
    return value, offset_mask


def _widen_offset_mask(value: Tensor, offset_mask: Tensor) -> Tensor:
    """Lossless promotion of an `offset_mask` that is narrower than `value`."""
    if value.dtype == offset_mask.dtype or offset_mask.dtype not in FLOAT_DTYPES:
        return offset_mask
    if value.dtype == torch.float64 or (value.dtype == torch.float32
                                        and offset_mask.dtype in HALF_DTYPES):
        return offset_mask.to(value.dtype)
    return offset_mask


def dcnv4(value: Tensor, offset_mask: Tensor, *, kernel_size: IntOrPair, groups: int,
          stride: IntOrPair = (1, 1), padding: IntOrPair = (0, 0), dilation: IntOrPair = (1, 1),
          offset_scale: float = 1.0, remove_center: bool = False, softmax: bool = False,
          backend: Optional[Backend] = None) -> Tensor:
    """Samples `value` at learned positions and sums the samples of each group.

    For output position p and group g, with K taps on the kernel grid::

        out[n, p, g, :] = sum_k  mask[n, p, g, k] * bilinear(value[n, :, :, g, :], x_k, y_k)
        x_k = wo*stride_w - padding_w + c_w + (i*dilation_w - c_w + dx_k) * offset_scale
        c_w = dilation_w * (kernel_w - 1) // 2

    and likewise for y_k with the row index j; taps run column by column, k = i*kernel_h + j.
    Positions are in input pixels, pixel centres on the integers. `offset_scale` multiplies the
    resting grid as well as the learned offset. Pixels outside the image count as zero, and so
    does a tap whose position is NaN or infinite. Without `softmax` the masks are used as they
    are.

    Args:
        value: input features, channels last. Shape (N, H, W, C), C = groups * D. Channel c
            belongs to group c // D. float64, float32, float16 or bfloat16.
        offset_mask: for each group 2K offsets (x, y interleaved, in pixels before scaling) and
            then K masks; groups one after another; zero or more unused channels at the end.
            Shape (N, Ho, Wo, P), P = groups * 3K rounded up to a multiple of 8. It has the dtype
            of `value`, or float32 with a half-precision `value`; a narrower one is widened.
        kernel_size: int or (kernel_h, kernel_w); K = kernel_h * kernel_w, one less with
            `remove_center`.
        groups: number of groups G; must divide C.
        stride, padding, dilation: int or (height, width), in input pixels.
        offset_scale: factor on grid and offsets.
        remove_center: leave out the middle tap; both kernel sides must be odd.
        softmax: normalise the masks over the K taps of each group (the DCNv3 weights).
        backend: 'native', 'pytorch' or 'auto'; None follows :func:`use_backend`, then the
            environment variable MMDCNV4_BACKEND, then 'auto'.

    Returns:
        Shape (N, Ho, Wo, C), contiguous, dtype and device of `value`.
        Ho = (H + 2*padding_h - dilation_h*(kernel_h - 1) - 1) // stride_h + 1.

    Raises:
        TypeError, ValueError: an argument breaks the rules above; the message names it.
        NotImplementedError: `backend='native'` and no kernel exists for the device.

    Numerics:
        float16 and bfloat16 accumulate in float32 and are rounded once. Under autocast `value`
        is cast to the autocast dtype and a float32 `offset_mask` is kept. The CPU kernels are
        bitwise repeatable for any number of threads. NaN reaches the results whose samples touch
        it, and no others. So does an infinite pixel, mask or gradient, but whether such a result
        is infinite or NaN (inf * 0, inf - inf) may differ between the backends.

    Source:
        "Efficient Deformable ConvNets", arXiv:2401.06197, section 3; the packing and the
        column-major tap order are those of the published checkpoints.

    Example:
        >>> import torch
        >>> value, offset_mask = torch.randn(2, 14, 14, 64), torch.randn(2, 14, 14, 112)
        >>> dcnv4(value, offset_mask, kernel_size=3, groups=4, padding=1).shape
        torch.Size([2, 14, 14, 64])
    """
    out = _call_plain(backend, value, offset_mask, kernel_size, groups, stride, padding, dilation,
                      offset_scale, remove_center, softmax)
    if out is not NotImplemented:
        return out
    geometry = make_geometry(kernel_size=kernel_size, groups=groups, stride=stride,
                             padding=padding, dilation=dilation, offset_scale=offset_scale,
                             remove_center=remove_center, softmax=softmax)
    check_types(value, offset_mask)
    return _call_any(backend, value, offset_mask, geometry)


def apply_geometry(value: Tensor, offset_mask: Tensor, geometry: Geometry) -> Tensor:
    """`dcnv4` with its scalars already checked, for those who call it often.

    Args:
        value: (N, H, W, C).
        offset_mask: (N, Ho, Wo, P).
        geometry: of `make_geometry`.

    Returns:
        (N, Ho, Wo, C).
    """
    out = _call_plain(None, value, offset_mask, *geometry)
    return _call_any(None, value, offset_mask, geometry) if out is NotImplemented else out


def _call_plain(backend: Optional[str], *arguments: Any) -> Any:
    """The short way: checked, cast and differentiated in C++. NotImplemented where it is closed."""
    if torch.compiler.is_compiling():
        return NotImplemented
    chosen = _override.get() or _from_environment if backend is None else backend
    if chosen not in _COMPILED:
        return NotImplemented
    return _extension.call_dcnv4(*arguments)


def _call_any(backend: Optional[str], value: Tensor, offset_mask: Tensor,
              geometry: Geometry) -> Tensor:
    """The long way, for every backend, device and mode."""
    chosen = _choose(backend, value.device.type)
    if _is_autocast_on(value.device.type):
        value, offset_mask = _cast_to_autocast(value, offset_mask)
    offset_mask = _widen_offset_mask(value, offset_mask)
    if chosen == 'pytorch':
        return evaluate_reference(value, offset_mask, geometry)
    return torch.ops.mmdcnv4.dcnv4(value, offset_mask, *geometry)  # which checks the tensors
