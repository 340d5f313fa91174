# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What torch tells under private names only, in one place.

Where a release of torch has moved one of them, the answer is "no": then a transform that the
compiled kernels cannot serve ends in torch's own error instead of taking the PyTorch path.
"""

from __future__ import annotations

from torch.autograd import forward_ad

try:
    from torch._C._functorch import TransformType, get_interpreter_stack
    _HAS_STACK = True
except ImportError:  # a later torch
    _HAS_STACK = False


def is_forward_mode() -> bool:
    """Whether a level of forward-mode differentiation is open."""
    return getattr(forward_ad, '_current_level', -1) >= 0


def is_gradient_transform() -> bool:
    """Whether torch.func.grad, vjp or jacrev is at work."""
    if not _HAS_STACK:
        return False
    return any(transform.key() == TransformType.Grad
               for transform in get_interpreter_stack() or ())
