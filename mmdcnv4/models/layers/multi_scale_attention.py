# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The deformable attention of mmcv with the kernels of this package.

Source:   "Deformable DETR", Zhu et al., ICLR 2021, arXiv:2010.04159, section 4.1.
Differs:  locations are always float32; native kernels on the CPU and in bfloat16; no im2col_step
          has to divide the batch; the sizes are read from the device once for all layers.
"""

from __future__ import annotations

import weakref
from typing import Any, Optional

import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention
from mmengine.registry import MODELS
from torch import Tensor, nn

from ...ops import has_multi_scale_kernel, multi_scale_deformable_attention

# Of the last tensor of sizes: to read it from a GPU waits for everything before, and all layers of
# a transformer get the same tensor.
_last: tuple[Any, int, list[tuple[int, int]]] = (lambda: None, 0, [])


def _read_sizes(spatial_shapes: Tensor) -> list[tuple[int, int]]:
    """(L, 2) integers as (height, width) of each level."""
    global _last
    tensor, version, sizes = _last
    # a tensor of inference mode has no version: nothing would tell that it was written to
    now = -1 if spatial_shapes.is_inference() else spatial_shapes._version
    if tensor() is not spatial_shapes or version != now or now < 0:
        sizes = [(height, width) for height, width in spatial_shapes.tolist()]
        _last = (weakref.ref(spatial_shapes), now, sizes)
    return sizes


@MODELS.register_module()
class MultiScaleAttention(MultiScaleDeformableAttention):
    """Multi-scale deformable attention; takes the place of mmcv's MultiScaleDeformableAttention.

    Arguments, parameters, start values and the names in checkpoints are those of the base class, of
    which `im2col_step` means nothing here. Models that build the base class by name take this one
    by the hook `MultiScaleAttentionHook`, or by :func:`use_multi_scale_attention`.

    Where the extension has no kernel for a device the base class computes.
    """

    def forward(self, query: Tensor, key: Optional[Tensor] = None, value: Optional[Tensor] = None,
                identity: Optional[Tensor] = None, query_pos: Optional[Tensor] = None,
                key_padding_mask: Optional[Tensor] = None,
                reference_points: Optional[Tensor] = None,
                spatial_shapes: Optional[Tensor] = None,
                level_start_index: Optional[Tensor] = None, **kwargs: Any) -> Tensor:
        """Maps queries to queries, the residual sum included.

        Args:
            query: shape (Q, B, C), or (B, Q, C) with `batch_first`, as `value` and the result.
            key: not used.
            value: shape (S, B, C), S pixels of all levels together; None: the query.
            identity: what the result is added to; None: the query.
            query_pos: added to the query; None: nothing.
            key_padding_mask: shape (B, S), True for padding, which reads as zero.
            reference_points: shape (B, Q, L, 2): x, y in widths and heights of the maps; or
                (B, Q, L, 4): with width and height of a box, within which the points lie.
            spatial_shapes: shape (L, 2), integers: height, width of each level.
            level_start_index: not used, it follows from the sizes.

        Raises:
            ValueError: the sizes do not fit the value, or the reference points have another shape.
        """
        if not has_multi_scale_kernel(query.device.type):
            return super().forward(query, key, value, identity, query_pos, key_padding_mask,
                                   reference_points, spatial_shapes, level_start_index, **kwargs)
        if reference_points is None or spatial_shapes is None:
            raise ValueError('MultiScaleAttention: reference_points and spatial_shapes must be '
                             'given')
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        out = multi_scale_deformable_attention(
            value.unflatten(-1, (self.num_heads, -1)), _read_sizes(spatial_shapes),
            self._locations(query, reference_points, spatial_shapes), self._weights(query))
        out = self.output_proj(out)
        if not self.batch_first:
            out = out.transpose(0, 1)
        return self.dropout(out) + identity

    def _weights(self, query: Tensor) -> Tensor:
        """(B, Q, C) -> (B, Q, heads, L, points); the sum over levels and points is 1."""
        weights = self.attention_weights(query).unflatten(-1, (self.num_heads, -1)).softmax(-1)
        return weights.unflatten(-1, (self.num_levels, self.num_points))

    def _locations(self, query: Tensor, reference: Tensor, spatial_shapes: Tensor) -> Tensor:
        """(B, Q, heads, L, points, 2) in widths and heights of the maps, float32."""
        # float64 stays float64
        dtype = torch.promote_types(query.dtype, torch.float32)
        layout = (self.num_heads, self.num_levels, self.num_points, 2)
        offsets = self.sampling_offsets(query).unflatten(-1, layout).to(dtype)
        reference = reference.to(dtype)[:, :, None, :, None]  # (B, Q, 1, L, 1, 2 or 4)
        if reference.shape[-1] == 2:
            return reference + offsets / spatial_shapes.flip(1)[:, None]
        if reference.shape[-1] == 4:
            return reference[..., :2] + offsets / self.num_points * reference[..., 2:] * 0.5
        raise ValueError('MultiScaleAttention: reference_points must have 2 or 4 numbers per '
                         f'level, got shape {tuple(reference.shape)}')


def use_multi_scale_attention(model: nn.Module) -> int:
    """Turns every MultiScaleDeformableAttention of mmcv in a model into a MultiScaleAttention.

    Modules, parameters and what refers to them stay the same objects; subclasses are left alone.

    Returns:
        How many MultiScaleAttention the model has then.
    """
    modules = list(model.modules())
    for module in modules:
        if type(module) is MultiScaleDeformableAttention:
            module.__class__ = MultiScaleAttention
    return sum(isinstance(module, MultiScaleAttention) for module in modules)
