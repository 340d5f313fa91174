# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Shapes of the operator for `torch.compile`, `torch.export` and meta tensors.

Schema, kernels, gradient and autocast are C++ (`csrc/`); the dispatcher joins all of them. Only the
fake kernels are Python: sizes may be symbols here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _extension
from .contract import Geometry, Pair, check_grad_output, check_tensors, make_geometry


def _check(value: Tensor, offset_mask: Tensor, scalars: tuple) -> Pair:
    # the scalars of the schema are the fields of a geometry, in their order
    return check_tensors(value, offset_mask, make_geometry(**Geometry(*scalars)._asdict()))


def _fake_forward(value: Tensor, offset_mask: Tensor, *scalars: Any) -> Tensor:
    out_h, out_w = _check(value, offset_mask, scalars)
    return value.new_empty((value.shape[0], out_h, out_w, value.shape[3]))


def _fake_backward(grad_output: Tensor, value: Tensor, offset_mask: Tensor,
                   *scalars: Any) -> tuple[Tensor, Tensor]:
    check_grad_output(grad_output, value, _check(value, offset_mask, scalars))
    return value.new_empty(value.shape), offset_mask.new_empty(offset_mask.shape)


if _extension.is_available:
    torch.library.register_fake('mmdcnv4::dcnv4', _fake_forward)
    torch.library.register_fake('mmdcnv4::_dcnv4_backward', _fake_backward)
