# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The operators that `gpu.py` times, each on the same inputs.

A peer is made for one problem and gives a function without arguments and the tensors that want
gradients. Peers that compute what `dcnv4` computes (`is_same`) are held to the reference first.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdcnv4.ops import dcnv4, offset_mask_channels

KERNEL, POINTS = 3, 9


class Problem(NamedTuple):
    """Inputs of one call: a 3x3 kernel, stride 1, padding 1."""

    value: Tensor  # (N, H, W, C)
    offset_mask: Tensor  # (N, H, W, P)
    groups: int
    offset_scale: float

    @property
    def bytes_moved(self) -> int:
        """Forward: every tensor read or written once."""
        return (2 * self.value.numel() + self.offset_mask.numel()) * self.value.element_size()

    @property
    def bytes_moved_backward(self) -> int:
        """Backward: value, grad_output and offset_mask read, two gradients written."""
        return (3 * self.value.numel() + 2 * self.offset_mask.numel()) * self.value.element_size()


class Call(NamedTuple):
    """Something to time."""

    run: Callable[[], Tensor]
    leaves: tuple[Tensor, ...]
    to_nhwc: Callable[[Tensor], Tensor] = lambda out: out
    prepare: Callable[[], None] = lambda: None  # before the first run, and after that of others


def offset_scale_of(offsets: str) -> float:
    """That of a distribution, see `make_problem`."""
    return 2.0 if offsets in ('D3', 'D4') else 1.0


def make_problem(shape: tuple[int, int, int, int], group_channels: int, dtype: torch.dtype,
                 offsets: str, device: str = 'cuda', seed: int = 0) -> Problem:
    """Random inputs; `offsets` names a distribution, in pixels before `offset_scale`.

    D0: none. D1: N(0, 0.5). D2: N(0, 2). D3: U(-2, 2), offset_scale 2. D4: U(-10, 10), scale 2.
    """
    batch, height, width, channels = shape
    groups = channels // group_channels
    generator = torch.Generator(device).manual_seed(seed)
    options = dict(generator=generator, device=device)
    value = torch.randn(shape, **options)
    packed = torch.randn(batch, height, width, offset_mask_channels(groups, POINTS), **options)
    used = packed[..., :groups * 3 * POINTS].unflatten(-1, (groups, -1))[..., :2 * POINTS]
    drawn = {'D0': lambda: used.zero_(), 'D1': lambda: used.mul_(0.5), 'D2': lambda: used.mul_(2),
             'D3': lambda: used.uniform_(-2, 2, generator=generator),
             'D4': lambda: used.uniform_(-10, 10, generator=generator)}
    if offsets not in drawn:
        raise ValueError(f'offsets must be one of {sorted(drawn)}, got {offsets!r}')
    drawn[offsets]()
    return Problem(value.to(dtype), packed.to(dtype), groups, offset_scale_of(offsets))


def ours(p: Problem, fast: bool = False) -> Call:
    """The kernels of this package; `fast`: those on tensor cores, where they are made for it."""
    value, packed = (t.detach().requires_grad_() for t in (p.value, p.offset_mask))
    # absent from CPU builds
    choose = getattr(torch.ops.mmdcnv4, '_set_cuda_fast', lambda choice: None)
    return Call(lambda: dcnv4(value, packed, kernel_size=KERNEL, padding=1, groups=p.groups,
                              offset_scale=p.offset_scale, backend='native'),
                (value, packed), prepare=lambda: choose(str(int(fast))))


def official(p: Problem) -> Call:
    """The released DCNv4 package, through its own Python function.

    Replayed from a graph this is its kernel and its zero fill; called, it is what its users get.
    """
    function = importlib.import_module('DCNv4.functions').DCNv4Function
    value, packed = (t.detach().requires_grad_() for t in (p.value, p.offset_mask))
    depth = p.value.shape[-1] // p.groups
    return Call(lambda: function.apply(value, packed, KERNEL, KERNEL, 1, 1, 1, 1, 1, 1, p.groups,
                                       depth, p.offset_scale, 256, False).view_as(value),
                (value, packed))


def unpacked(p: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, offsets, masks and weights of the same function as a modulated convolution.

    Taps go row by row there, offsets are (y, x) and are not scaled, weights are one per channel.
    """
    batch, height, width, channels = p.value.shape
    packed = p.offset_mask[..., :p.groups * 3 * POINTS].unflatten(-1, (p.groups, -1))
    offset = packed[..., :2 * POINTS].unflatten(-1, (KERNEL, KERNEL, 2))  # (…, i, j, xy)
    rest = torch.arange(-1.0, 2.0, device=offset.device, dtype=offset.dtype) * (p.offset_scale - 1)
    x = offset[..., 0] * p.offset_scale + rest[:, None]
    y = offset[..., 1] * p.offset_scale + rest
    pairs = torch.stack([y, x], -1).transpose(-3, -2)  # (N, H, W, G, j, i, yx)
    mask = packed[..., 2 * POINTS:].unflatten(-1, (KERNEL, KERNEL)).transpose(-2, -1)
    planes = [t.reshape(batch, height, width, -1).permute(0, 3, 1, 2).contiguous()
              for t in (p.value, pairs, mask)]
    return (*planes, p.value.new_ones(channels, 1, KERNEL, KERNEL))


def torchvision(p: Problem) -> Call:
    """torchvision's modulated deformable convolution, NCHW."""
    function = importlib.import_module('torchvision.ops').deform_conv2d
    image, offset, mask, weight = unpacked(p)
    leaves = tuple(t.requires_grad_() for t in (image, offset, mask))
    return Call(lambda: function(image, offset, weight, padding=1, mask=mask), leaves,
                lambda out: out.permute(0, 2, 3, 1))


def mmcv(p: Problem) -> Call:
    """mmcv's modulated deformable convolution, NCHW."""
    function = importlib.import_module('mmcv.ops').modulated_deform_conv2d
    image, offset, mask, weight = unpacked(p)
    leaves = tuple(t.requires_grad_() for t in (image, offset, mask))
    channels = image.shape[1]
    return Call(lambda: function(image, offset, mask, weight, None, 1, 1, 1, channels, p.groups),
                leaves, lambda out: out.permute(0, 2, 3, 1))


def depthwise(p: Problem, memory_format: torch.memory_format) -> Call:
    """A depthwise 7x7 convolution of the same map: another function, a common rival."""
    channels = p.value.shape[-1]
    image = p.value.permute(0, 3, 1, 2).contiguous(memory_format=memory_format).requires_grad_()
    weight = torch.randn(channels, 1, 7, 7, device=image.device).to(image.dtype)
    weight = weight.contiguous(memory_format=memory_format).requires_grad_()
    return Call(lambda: F.conv2d(image, weight, padding=3, groups=channels), (image, weight))


def attention(p: Problem) -> Call:
    """Global attention over the pixels, heads of 32 channels: another function, a common rival."""
    batch, height, width, channels = p.value.shape
    tokens = p.value.reshape(batch, height * width, channels // 32, 32).transpose(1, 2)
    leaves = tuple(tokens.clone().requires_grad_() for _ in range(3))
    return Call(lambda: F.scaled_dot_product_attention(*leaves), leaves)


class Peer(NamedTuple):
    """A peer by name; `module` must be importable."""

    make: Callable[[Problem], Call]
    module: Optional[str] = None
    is_same: bool = False


PEERS = {
    'ours': Peer(ours, is_same=True),
    'ours fast': Peer(lambda p: ours(p, fast=True), is_same=True),
    'official': Peer(official, 'DCNv4.functions', is_same=True),
    'torchvision': Peer(torchvision, 'torchvision.ops', is_same=True),
    'mmcv': Peer(mmcv, 'mmcv.ops', is_same=True),
    'depthwise 7x7 nchw': Peer(lambda p: depthwise(p, torch.contiguous_format)),
    'depthwise 7x7 nhwc': Peer(lambda p: depthwise(p, torch.channels_last)),
    'attention': Peer(attention),
}


def absent(name: str) -> str:
    """Why a peer cannot be timed here, or an empty string."""
    module = PEERS[name].module
    if module is None:
        return ''
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        return f'{module} cannot be imported: {str(error).splitlines()[0]}'
    if name == 'torchvision' and not hasattr(torch.ops.torchvision, 'deform_conv2d'):
        return 'torchvision is installed without its operators'
    return ''
