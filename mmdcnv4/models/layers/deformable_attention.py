# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Deformable multi-head attention: all queries share keys that are sampled at learned positions.

Source:   "Vision Transformer with Deformable Attention", Xia et al., CVPR 2022, arXiv:2201.00520,
          section 3.2; "DAT++: Spatially Dynamic Vision Transformer with Deformable Attention",
          Xia et al., arXiv:2309.01430, section 3.
Differs:  works at any size of the map; queries are processed in chunks that are computed again in
          the backward pass, so that memory grows linearly with the number of pixels. Where paper
          and released weights disagree (`ref_mode`), the weights are followed by default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backbone import full_precision, recompute
from .local_attention import MAX_LOGITS, pad_at_least
from .norm import map_norm

POSITION_BIASES = ('deformable', 'depthwise', 'fixed', 'log_cpb', 'none')
REF_MODES = ('code', 'paper', 'v1')
_CPB_WIDTH = 32


@dataclass(frozen=True)
class DeformableOptions:
    """What all deformable attention layers of a backbone have in common.

    Attributes:
        offset_range_factor: f >= 0 bounds the offsets by f cells (f * tanh); -1 leaves them free
            and clamps the positions to the map.
        ref_mode: where the keys rest, see :meth:`DeformableAttention.reference_points`.
        position_bias: 'deformable' (a table, sampled at the displacement of query and key),
            'depthwise' (a 3x3 convolution of the queries, added to the result), 'fixed' (a number
            per query and key; one size of map only), 'log_cpb' (a small network of the
            displacement on a logarithmic scale), 'none'.
        use_offsets: False gives average pooling in place of sampling, and no position bias.
    """

    offset_range_factor: float = -1.0
    ref_mode: str = 'code'
    position_bias: str = 'deformable'
    use_offsets: bool = True


class DeformableAttention(nn.Module):
    """Attention of every pixel to a grid of keys, each moved by an offset that the queries predict.

    Args:
        channels: width C.
        heads: h, divides C.
        groups: g, offset groups; divides h. Head m belongs to group m // (h / g).
        stride: pixels per cell of the grid of keys.
        kernel_size: of the offset network's depthwise convolution.
        size: (height, width) of the map for which the tables are made; others stretch them.
        options: of the backbone.
    """

    proj_q: nn.Conv2d
    proj_k: nn.Conv2d
    proj_v: nn.Conv2d
    proj_out: nn.Conv2d
    rpe_table: Any  # a table, or the network that replaces it

    def __init__(self, channels: int, heads: int, groups: int, stride: int, kernel_size: int,
                 size: tuple[int, int], options: DeformableOptions) -> None:
        super().__init__()
        self.heads, self.groups, self.stride = heads, groups, stride
        self.kernel_size, self.size, self.options = kernel_size, size, options
        width = channels // groups
        self.conv_offset = nn.Sequential(
            nn.Conv2d(width, width, kernel_size, stride,
                      kernel_size // 2 if kernel_size != stride else 0, groups=width),
            map_norm(width), nn.GELU(), nn.Conv2d(width, 2, 1, bias=False))
        for name in ('proj_q', 'proj_k', 'proj_v', 'proj_out'):
            setattr(self, name, nn.Conv2d(channels, channels, 1))
        self.position_bias = options.position_bias if options.use_offsets else 'none'
        if self.position_bias == 'deformable':
            self.rpe_table = nn.Parameter(
                torch.empty(heads, 2 * size[0] - 1, 2 * size[1] - 1))
        elif self.position_bias == 'fixed':
            cells = math.prod(-(-length // stride) for length in size)
            self.rpe_table = nn.Parameter(torch.empty(heads, size[0] * size[1], cells))
        elif self.position_bias == 'depthwise':
            self.rpe_table = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        elif self.position_bias == 'log_cpb':
            self.rpe_table = nn.Sequential(
                nn.Linear(2, _CPB_WIDTH), nn.ReLU(),
                nn.Linear(_CPB_WIDTH, heads // groups, bias=False))
        if not options.use_offsets:
            self.conv_offset.requires_grad_(False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial values of the bias table; the layers reset themselves."""
        if self.position_bias in ('deformable', 'fixed'):
            nn.init.trunc_normal_(self.rpe_table, std=0.01)

    def reference_points(self, length: int, like: Tensor) -> Tensor:
        """Where `length` keys along an axis rest, in units in which the map is [-1, 1].

        'code', as the DAT+ and DAT++ weights were trained: half a cell further than the paper's
        even lattice from corner to corner; the last one is outside the map. 'v1', as the DAT
        weights: the centres of equal cells.
        """
        index = torch.arange(length, device=like.device, dtype=like.dtype)
        if self.options.ref_mode == 'v1':
            return 2 * (index + 0.5) / length - 1
        if self.options.ref_mode == 'paper' and length > 1:
            return 2 * index / (length - 1) - 1
        return 2 * (index + 0.5) / max(length - 1, 1) - 1

    def query_points(self, index: Tensor, length: int) -> Tensor:
        """Where the queries `index` of an axis of `length` stand, in the same units."""
        if self.options.ref_mode == 'v1':
            return 2 * (index + 0.5) / length - 1
        return 2 * index / max(length - 1, 1) - 1

    def positions(self, q: Tensor) -> Tensor:
        """Positions of the keys for queries `q` (N, C, H, W): (N * g, Hk, Wk, 2), (x, y)."""
        grouped = pad_at_least(q.unflatten(1, (self.groups, -1)).flatten(0, 1),
                               self.kernel_size if self.kernel_size == self.stride else 1)
        offset = self.conv_offset(grouped)  # (N * g, 2, Hk, Wk); channel 0 is y
        offset = offset.to(torch.promote_types(offset.dtype, torch.float32))
        factor, places = self.options.offset_range_factor, []
        for axis, length in enumerate(offset.shape[2:]):
            delta = offset[:, axis]
            is_v1 = self.options.ref_mode == 'v1'
            if factor > 0 or (factor == 0 and not is_v1):
                delta = factor * delta.tanh() / (length if is_v1 else max(length - 1, 1))
            rest = self.reference_points(length, offset)
            place = delta + (rest[:, None] if axis == 0 else rest)
            if factor < 0:
                place = place.tanh() if is_v1 else place.clamp(-1, 1)
            places.append(place)
        return torch.stack(places[::-1], -1)

    def _sample(self, x: Tensor, points: Tensor) -> Tensor:
        """Bilinear samples of `x` (N, C, H, W) at `points`, (N, C, 1, Hk * Wk)."""
        grouped = x.unflatten(1, (self.groups, -1)).flatten(0, 1)
        out = F.grid_sample(grouped.to(points.dtype), points, align_corners=True)
        return out.unflatten(0, (x.shape[0], self.groups)).flatten(3).flatten(1, 2).unsqueeze(2)

    def _bias(self, points: Tensor, first: int, count: int, size: tuple[int, int]) -> Tensor:
        """Bias of the queries `first ... first + count` of a map of that size.

        Args:
            points: positions of the keys, (N * g, Ns, 2).

        Returns:
            (N, heads, count, Ns).
        """
        batch = points.shape[0] // self.groups
        index = torch.arange(first, first + count, device=points.device)
        places = (self.query_points((index % size[1]).to(points.dtype), size[1]),
                  self.query_points((index // size[1]).to(points.dtype), size[0]))
        gap = torch.stack(places, -1)[:, None] - points[:, None]  # (N * g, count, Ns, 2)
        if self.position_bias == 'log_cpb':
            gap = 4 * gap.flip(-1)  # the network reads (y, x)
            gap = gap.sign() * torch.log2(1 + gap.abs()) / math.log2(8)
            bias = self.rpe_table(gap.to(self.rpe_table[0].weight.dtype))
            bias = bias.permute(0, 3, 1, 2)
        else:
            table = self.rpe_table.to(points.dtype).unflatten(0, (self.groups, -1))
            table = table.expand(batch, *table.shape).flatten(0, 1)
            bias = F.grid_sample(table, gap / 2, align_corners=True)
        return bias.unflatten(0, (batch, self.groups)).flatten(1, 2)

    def _attend_chunk(self, q: Tensor, k: Tensor, v: Tensor, points: Optional[Tensor],
                      first: int, size: tuple[int, int]) -> Tensor:
        """Attention of some queries (N, h, count, d) to all keys (N, h, Ns, d)."""
        bias = None
        if self.position_bias == 'fixed':
            bias = self.rpe_table[:, first:first + q.shape[2]].to(q.dtype)
        elif points is not None and self.position_bias in ('deformable', 'log_cpb'):
            with full_precision(q):
                bias = self._bias(points, first, q.shape[2], size).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, points: Optional[Tensor],
                size: tuple[int, int]) -> Tensor:
        """Attention of all queries (N, h, H * W, d), in chunks."""
        per_query = q.shape[0] * self.heads * k.shape[2]
        if self.position_bias == 'log_cpb':
            per_query *= _CPB_WIDTH
        step = max(MAX_LOGITS // max(per_query, 1), 1)
        if step >= q.shape[2]:
            return self._attend_chunk(q, k, v, points, 0, size)
        return torch.cat([
            recompute(self._attend_chunk, q[:, :, first:first + step], k, v, points, first, size,
                      preserve_rng_state=False)
            for first in range(0, q.shape[2], step)], 2)

    def _pool(self, x: Tensor) -> Tensor:
        """The keys without offsets."""
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise ValueError(
                'DeformableAttention: without offsets x must have a height and a width that '
                f'{self.stride} divides, got {tuple(x.shape[2:])}')
        return F.avg_pool2d(x, self.stride).flatten(2).unsqueeze(2)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (N, C, H, W) to (N, C, H, W).

        Raises:
            ValueError: the map has a size that `position_bias='fixed'` or `use_offsets=False`
                cannot handle.
        """
        size = (x.shape[2], x.shape[3])
        if self.position_bias == 'fixed' and size != self.size:
            raise ValueError("DeformableAttention: with position_bias='fixed' x must have the size "
                             f'{self.size} of construction, got {size}')
        q, points = self.proj_q(x), None
        if self.options.use_offsets:
            with full_precision(x):
                points = self.positions(q.to(self.proj_q.weight.dtype))
                keys = self._sample(x, points)
            points = points.flatten(1, 2)
        else:
            keys = self._pool(x)
        split = (self.heads, -1)
        k, v = (layer(keys.to(x.dtype)).flatten(2).unflatten(1, split).transpose(2, 3)
                for layer in (self.proj_k, self.proj_v))
        queries = q.flatten(2).unflatten(1, split).transpose(2, 3)  # (N, h, H * W, d)
        out = self._attend(queries, k, v, points, size)
        out = out.transpose(2, 3).flatten(1, 2).unflatten(2, size)
        if self.position_bias == 'depthwise':
            out = out + self.rpe_table(q)
        return self.proj_out(out)
