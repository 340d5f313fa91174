# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Deformable attention on the BEV plane and from the BEV plane into the cameras.

Source:   "BEVFormer", Li et al., ECCV 2022, arXiv:2203.17270, sections 3.2 to 3.4; "Deformable
          DETR", Zhu et al., ICLR 2021, arXiv:2010.04159, eq. (3).
Differs:  the lists of visible cells are made for every sample of a batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Optional

import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction
from torch import Tensor, nn

from ...ops import has_multi_scale_kernel, multi_scale_deformable_attention
from ..geometry import constant

Sizes = Sequence[tuple[int, int]]  # (height, width) of each level


def deformable_attention(value: Tensor, sizes: Sizes, locations: Tensor,
                         weights: Tensor) -> Tensor:
    """Multi-scale deformable attention in float32, also under autocast.

    In half precision locations on a map 200 cells wide would go in steps of a tenth of a cell.

    Args:
        value: shape (B, sum of H_l * W_l, heads, D).
        sizes: (H_l, W_l) of the L levels.
        locations: shape (B, Q, heads, L, P, 2), x, y in widths and heights of the maps.
        weights: shape (B, Q, heads, L, P).

    Returns:
        Shape (B, Q, heads * D), float32. What lies outside a map counts as zero.
    """
    with torch.autocast(value.device.type, enabled=False):
        value, locations, weights = value.float(), locations.float(), weights.float()
        if not value.is_cuda or has_multi_scale_kernel('cuda'):
            return multi_scale_deformable_attention(value, sizes, locations, weights)
        # built without CUDA: mmcv's kernel rather than the form in PyTorch
        shapes = constant(value, [side for size in sizes for side in size], torch.long).view(-1, 2)
        areas = shapes.prod(1)
        # the last argument must divide the batch: the batch itself always does
        return MultiScaleDeformableAttnFunction.apply(
            value.contiguous(), shapes, areas.cumsum(0) - areas, locations.contiguous(),
            weights.contiguous(), value.shape[0])


def ring_offsets(num_heads: int, num_levels: int, num_points: int) -> Tensor:
    """Start offsets in cells: every head looks its own way, point i at distance i + 1.

    Returns:
        Shape (heads * levels * points * 2,).
    """
    angles = torch.arange(num_heads, dtype=torch.float32) * (2 * math.pi / num_heads)
    ring = torch.stack([angles.cos(), angles.sin()], -1)
    ring = ring / ring.abs().max(-1, keepdim=True).values
    distances = torch.arange(1, num_points + 1, dtype=torch.float32)
    offsets = ring[:, None, None] * distances[None, None, :, None]
    return offsets.expand(-1, num_levels, -1, -1).flatten()


def _reset_projections(*layers: nn.Linear) -> None:
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)


def _reset_sampling(offsets: nn.Linear, weights: nn.Linear, start: Tensor) -> None:
    for tensor in (offsets.weight, weights.weight, weights.bias):
        nn.init.zeros_(tensor)
    with torch.no_grad():
        offsets.bias.copy_(start)


def _normalizer(sizes: Sizes, like: Tensor) -> Tensor:
    """(L, 2): width and height of each level."""
    return constant(like, [side for size in sizes for side in size[::-1]]).view(-1, 2)


class BEVSelfAttention(nn.Module):
    """Self-attention of BEV cells: temporal self-attention of BEVFormer without a history.

    It has two branches, of which the first would look at the previous BEV features; both look at
    the current ones, with their own offsets and weights, and are averaged.

    Args:
        embed_dims: width C.
        num_heads: heads; divides C.
        num_points: points per head and branch.
        dropout: on the output, before the residual sum.
    """

    num_branches = 2

    def __init__(self, embed_dims: int = 256, num_heads: int = 8, num_points: int = 4,
                 dropout: float = 0.1) -> None:
        super().__init__()
        self.num_heads, self.num_points = num_heads, num_points
        samples = num_heads * self.num_branches * num_points
        self.sampling_offsets = nn.Linear(2 * embed_dims, 2 * samples)
        self.attention_weights = nn.Linear(2 * embed_dims, samples)
        self.value_proj = nn.Linear(embed_dims, embed_dims)
        self.output_proj = nn.Linear(embed_dims, embed_dims)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values: offsets on a ring, equal weights."""
        _reset_projections(self.value_proj, self.output_proj)
        _reset_sampling(self.sampling_offsets, self.attention_weights,
                        ring_offsets(self.num_heads, self.num_branches, self.num_points))

    def forward(self, query: Tensor, query_pos: Tensor, reference: Tensor,
                bev_size: tuple[int, int]) -> Tensor:
        """Maps (B, Q, C) to (B, Q, C), the residual sum included.

        Args:
            query: shape (B, Q, C), Q = Hb * Wb.
            query_pos: shape (1 or B, Q, C); not part of the values.
            reference: shape (Q, 2): cell centres, x, y in widths and heights of the map.
            bev_size: (Hb, Wb).
        """
        batch, cells, _ = query.shape
        both = torch.cat([query, query + query_pos], -1)  # (B, Q, 2C)
        layout = (batch, cells, self.num_heads, self.num_branches, self.num_points)
        offsets = self.sampling_offsets(both).view(*layout, 2).float()
        weights = self.attention_weights(both).view(layout).float().softmax(-1)
        locations = reference.float()[None, :, None, None, None] + offsets / _normalizer(
            [bev_size], offsets)
        value = self.value_proj(query).unflatten(-1, (self.num_heads, -1))
        # both branches read the same values: they are more points of one call
        out = deformable_attention(value, [bev_size], locations.flatten(3, 4)[:, :, :, None],
                                   weights.flatten(3)[:, :, :, None] / self.num_branches)
        return query + self.dropout(self.output_proj(out))


class PillarDeformableAttention(nn.Module):
    """Deformable attention with several reference points per query, those of a pillar.

    Args:
        embed_dims: width C.
        num_heads: heads; divides C.
        num_levels: feature levels.
        num_points: points per head and level; a multiple of the points of a pillar.
    """

    def __init__(self, embed_dims: int = 256, num_heads: int = 8, num_levels: int = 4,
                 num_points: int = 8) -> None:
        super().__init__()
        self.num_heads, self.num_levels, self.num_points = num_heads, num_levels, num_points
        samples = num_heads * num_levels * num_points
        self.sampling_offsets = nn.Linear(embed_dims, 2 * samples)
        self.attention_weights = nn.Linear(embed_dims, samples)
        self.value_proj = nn.Linear(embed_dims, embed_dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values: offsets on a ring, equal weights."""
        _reset_projections(self.value_proj)
        _reset_sampling(self.sampling_offsets, self.attention_weights,
                        ring_offsets(self.num_heads, self.num_levels, self.num_points))

    def forward(self, query: Tensor, tokens: Tensor, reference: Tensor, sizes: Sizes,
                is_image: Optional[Tensor] = None) -> Tensor:
        """Reads the feature maps around the reference points; no output projection.

        Args:
            query: shape (M, Q, C).
            tokens: shape (M, sum of H_l * W_l, C).
            reference: shape (M, Q, Z, 2), x, y in widths and heights of the image.
            sizes: (H_l, W_l) of the levels.
            is_image: shape (M, sum of H_l * W_l): False for padding, which reads as zero, as
                does what lies outside the maps; None if there is none.

        Returns:
            Shape (M, Q, C), float32.
        """
        batch, queries, _ = query.shape
        pillar = reference.shape[2]
        layout = (batch, queries, self.num_heads, self.num_levels, self.num_points)
        weights = self.attention_weights(query).view(*layout[:3], -1).float().softmax(-1)
        offsets = self.sampling_offsets(query).view(*layout, 2).float()
        offsets = offsets / _normalizer(sizes, offsets)[:, None]
        # the points of a head and level are ordered (k, z): point p belongs to height p % Z
        offsets = offsets.unflatten(4, (-1, pillar))
        locations = (reference.float()[:, :, None, None, None] + offsets).flatten(4, 5)
        value = self.value_proj(tokens)
        if is_image is not None:
            value = value.where(is_image[..., None], 0)
        value = value.unflatten(-1, (self.num_heads, -1))
        return deformable_attention(value, sizes, locations, weights.view(layout))


@dataclass(frozen=True)
class VisibleCells:
    """Which BEV cells a camera sees, as padded lists; made once per frame for all layers.

    Attributes:
        index: shape (B * V, M): cells of each camera of each sample; M is the longest list.
        is_used: shape (B * V, M): False for padding.
        reference: shape (B * V, M, Z, 2): where the points of these cells project to.
        num_views: shape (B, Q, 1): cameras that see a cell, at least 1.
        is_image: shape (B * V, tokens): False for tokens of padding; None if there is none.
    """

    index: Tensor
    is_used: Tensor
    reference: Tensor
    num_views: Tensor
    is_image: Optional[Tensor] = None

    @classmethod
    def of(cls, frames: Sequence[tuple[Tensor, Tensor]]) -> list[VisibleCells]:
        """Of several frames: the host waits once, for the lengths of the longest lists.

        Args:
            frames: for each frame projected points, shape (B, V, Q, Z, 2), and whether they are
                visible, shape (B, V, Q, Z).
        """
        hits = [is_visible.any(-1) for _, is_visible in frames]  # (B, V, Q)
        counts = [hit.sum(-1).flatten() for hit in hits]
        longest = torch.stack([count.max() for count in counts]).tolist()
        return [cls._of_frame(uv, *rest)
                for (uv, _), *rest in zip(frames, hits, counts, longest)]

    @classmethod
    def _of_frame(cls, uv: Tensor, hit: Tensor, counts: Tensor, longest: int) -> VisibleCells:
        longest = max(longest, 1)
        num_views = hit.sum(1).clamp(min=1)[..., None]
        hit, uv = hit.flatten(0, 1), uv.flatten(0, 1)
        index = hit.int().argsort(dim=-1, descending=True, stable=True)[:, :longest]
        is_used = torch.arange(longest, device=uv.device)[None] < counts[:, None]
        rows = torch.arange(len(uv), device=uv.device)[:, None]
        return cls(index, is_used, uv[rows, index], num_views)


class SpatialCrossAttention(nn.Module):
    """BEV cells read from the cameras that see them; a cell's result is the mean over these.

    Args:
        embed_dims: width C.
        num_heads, num_levels, num_points: of :class:`PillarDeformableAttention`.
        dropout: on the output, before the residual sum.
    """

    def __init__(self, embed_dims: int = 256, num_heads: int = 8, num_levels: int = 4,
                 num_points: int = 8, dropout: float = 0.1) -> None:
        super().__init__()
        self.deform = PillarDeformableAttention(embed_dims, num_heads, num_levels, num_points)
        self.output_proj = nn.Linear(embed_dims, embed_dims)
        self.dropout = nn.Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values, also of the attention inside."""
        self.deform.reset_parameters()
        _reset_projections(self.output_proj)

    def forward(self, query: Tensor, tokens: Tensor, cells: VisibleCells, sizes: Sizes) -> Tensor:
        """Maps (B, Q, C) to (B, Q, C), the residual sum included.

        Args:
            query: shape (B, Q, C).
            tokens: image tokens, shape (B * V, sum of H_l * W_l, C).
            cells: what the cameras see.
            sizes: (H_l, W_l) of the levels.
        """
        batch, num_cells, channels = query.shape
        sample = torch.arange(len(tokens), device=query.device) // (len(tokens) // batch)
        rows = (sample[:, None] * num_cells + cells.index)  # (B*V, M), into (B*Q)
        out = self.deform(query.flatten(0, 1)[rows], tokens, cells.reference, sizes,
                          cells.is_image)
        out = out * cells.is_used[..., None]
        slots = out.new_zeros(batch * num_cells, channels)
        slots = slots.index_add(0, rows.flatten(), out.flatten(0, 1))
        slots = slots.view(batch, num_cells, channels) / cells.num_views
        return query + self.dropout(self.output_proj(slots))
