# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Multi-scale deformable attention in the packed layout of the released FlashDeformAttn.

Source:   "Efficient Deformable ConvNets", Xiong et al., CVPR 2024, arXiv:2401.06197, appendix;
          "Deformable DETR", Zhu et al., ICLR 2021, arXiv:2010.04159, eq. (3).
Differs:  any number of points, levels, heads and channels; CPU and CUDA; float64, float32, float16
          and bfloat16; the module keeps locations in float32, where the released one rounds them to
          float16.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
from torch import Tensor, nn

from .functional import Backend
from .multi_scale import Sizes, multi_scale_deformable_attention


def flash_deform_attn(value: Tensor, sizes: Sizes, packed: Tensor, points: int, *,
                      backend: Optional[Backend] = None) -> Tensor:
    """Multi-scale deformable attention whose locations and logits are one tensor.

    Args:
        value, sizes, backend: of :func:`multi_scale_deformable_attention`.
        packed: shape (B, Q, heads, 3 * L * points): x, y of every sample, level by level, in widths
            and heights of the map; after them the logits of the samples, in the same order, of
            which the softmax over levels and points is taken in float32 (float64 for float64).
        points: samples per head and level.

    Returns:
        Shape (B, Q, heads * D), dtype of `value`.

    Raises:
        ValueError: `packed` has another shape; and as :func:`multi_scale_deformable_attention`.
    """
    levels, samples = len(sizes), len(sizes) * points
    if packed.dim() != 4 or packed.shape[3] != 3 * samples:
        raise ValueError(f'flash_deform_attn: packed must have shape (B, Q, heads, {3 * samples}), '
                         f'3 * levels * points, got {tuple(packed.shape)}')
    locations = packed[..., :2 * samples].unflatten(-1, (levels, points, 2))
    logits = packed[..., 2 * samples:]
    weights = logits.softmax(-1, torch.promote_types(logits.dtype, torch.float32))
    return multi_scale_deformable_attention(
        value, sizes, locations, weights.unflatten(-1, (levels, points)), backend=backend)


class FlashDeformAttn(nn.Module):
    """The module of the released FlashDeformAttn; takes its checkpoints.

    Args:
        d_model: width C.
        n_levels: levels L.
        n_heads: heads; divides `d_model`.
        n_points: points per head and level.

    Raises:
        ValueError: `n_heads` does not divide `d_model`.
    """

    def __init__(self, d_model: int = 256, n_levels: int = 4, n_heads: int = 8,
                 n_points: int = 4) -> None:
        super().__init__()
        if d_model % n_heads != 0:
            raise ValueError('FlashDeformAttn: n_heads must divide d_model, got '
                             f'd_model={d_model}, n_heads={n_heads}')
        self.d_model, self.n_levels, self.n_heads = d_model, n_levels, n_heads
        self.n_points = n_points
        samples = n_heads * n_levels * n_points
        self.sampling_offsets = nn.Linear(d_model, 2 * samples)
        self.attention_weights = nn.Linear(d_model, samples)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values: every head looks its own way, point i at distance i + 1; equal weights."""
        for layer in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        for tensor in (self.sampling_offsets.weight, *self.attention_weights.parameters()):
            nn.init.zeros_(tensor)
        angles = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        ring = torch.stack([angles.cos(), angles.sin()], -1)
        ring = ring / ring.abs().amax(-1, keepdim=True)  # on a square
        steps = torch.arange(1, self.n_points + 1, dtype=torch.float32)[:, None]
        offsets = (ring[:, None, None] * steps).expand(-1, self.n_levels, -1, -1)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.flatten())

    def forward(self, query: Tensor, reference_points: Tensor, input_flatten: Tensor,
                input_spatial_shapes: Tensor, input_level_start_index: Optional[Tensor] = None,
                input_padding_mask: Optional[Tensor] = None) -> Tensor:
        """Maps (B, Q, C) to (B, Q, C).

        Args:
            query: shape (B, Q, C).
            reference_points: shape (B, Q, L, 2): x, y in widths and heights of the maps; or
                (B, Q, L, 4): with width and height of a box, within which the points lie.
            input_flatten: the maps, flattened and one after another. Shape (B, S, C).
            input_spatial_shapes: shape (L, 2), integers: height, width of each level.
            input_level_start_index: not used, it follows from the sizes.
            input_padding_mask: shape (B, S), True for padding, which reads as zero.

        Raises:
            ValueError: the sizes do not fit the maps, or the reference points have another shape.
        """
        value = self.value_proj(input_flatten)
        if input_padding_mask is not None:
            value = value.masked_fill(input_padding_mask[..., None], 0.0)
        layout = (self.n_heads, self.n_levels, self.n_points, 2)
        dtype = torch.promote_types(query.dtype, torch.float32)
        offsets = self.sampling_offsets(query).unflatten(-1, layout).to(dtype)
        reference = reference_points.to(dtype)[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
        if reference.shape[-1] == 2:
            locations = reference + offsets / input_spatial_shapes.flip(1)[:, None]
        elif reference.shape[-1] == 4:
            locations = reference[..., :2] + offsets / self.n_points * reference[..., 2:] * 0.5
        else:
            raise ValueError('FlashDeformAttn: reference_points must have 2 or 4 numbers per '
                             f'level, got shape {tuple(reference_points.shape)}')
        logits = self.attention_weights(query).unflatten(-1, (self.n_heads, -1)).to(dtype)
        packed = torch.cat([locations.flatten(3), logits], -1)
        sizes = [(height, width) for height, width in input_spatial_shapes.tolist()]
        return self.output_proj(flash_deform_attn(
            value.unflatten(-1, (self.n_heads, -1)), sizes, packed, self.n_points))
