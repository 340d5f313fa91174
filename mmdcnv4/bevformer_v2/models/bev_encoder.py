# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""BEV encoder: feature maps of all cameras to one feature map of the ground plane; and the fusion
of such maps over time.

Source:   "BEVFormer v2", arXiv:2211.10439, section 3.4; the layers are those of "BEVFormer",
          arXiv:2203.17270, section 3.
Differs:  other frames are encoded in the current LiDAR frame, by ego motion in `lidar2img`, as in
          the released system; the paper warps feature maps instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Optional, Union

import numpy as np
import torch
from mmcv.cnn import build_norm_layer
from mmcv.cnn.bricks.transformer import FFN
from mmdet.models.backbones.resnet import BasicBlock
from mmdet.models.layers import LearnedPositionalEncoding
from mmdet3d.registry import MODELS
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import InvalidValue
from ..geometry import check_range, pillar_points, project_points, to_device
from .attention import BEVSelfAttention, Sizes, SpatialCrossAttention, VisibleCells


class BEVEncoderLayer(nn.Module):
    """Self-attention of the cells, cross-attention into the cameras, FFN; a norm behind each.

    Args:
        embed_dims: width C.
        feedforward_channels: hidden width of the FFN.
        dropout: in all three branches.
        self_attn: arguments of :class:`BEVSelfAttention` besides these.
        cross_attn: arguments of :class:`SpatialCrossAttention` besides these.
    """

    def __init__(self, embed_dims: int, feedforward_channels: int, dropout: float,
                 self_attn: dict[str, Any], cross_attn: dict[str, Any]) -> None:
        super().__init__()
        self.self_attn = BEVSelfAttention(embed_dims, dropout=dropout, **self_attn)
        self.cross_attn = SpatialCrossAttention(embed_dims, dropout=dropout, **cross_attn)
        self.ffn = FFN(embed_dims, feedforward_channels, ffn_drop=dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dims) for _ in range(3))

    def forward(self, query: Tensor, query_pos: Tensor, reference: Tensor,
                bev_size: tuple[int, int], tokens: Tensor, cells: VisibleCells,
                sizes: Sizes) -> Tensor:
        """Maps (B, Q, C) to (B, Q, C); arguments as in the two attentions."""
        query = self.norms[0](self.self_attn(query, query_pos, reference, bev_size))
        query = self.norms[1](self.cross_attn(query, tokens, cells, sizes))
        return self.norms[2](self.ffn(query))


@MODELS.register_module()
class BEVFormerV2Encoder(BaseModule):
    """Maps of all cameras to BEV features of shape (B, Hb * Wb, C); row h follows y, column w x.

    Args:
        pc_range: (x_min, y_min, z_min, x_max, y_max, z_max) in metres, LiDAR frame.
        bev_size: (Hb, Wb).
        embed_dims: width C; even.
        num_layers: encoder layers.
        num_heads: heads of all attentions.
        num_cams: cameras V; their order is learned.
        num_levels: feature levels.
        num_pillar_points: points Z above a cell.
        num_points: sampling points per head and level in the cameras; a multiple of Z.
        feedforward_channels: hidden width of the FFNs.
        dropout: in all branches.
        with_cp: recompute layers in the backward pass to save memory.

    Raises:
        ValueError: the message names the argument, the expectation and the value.
    """

    def __init__(self, pc_range: Sequence[float], bev_size: Sequence[int] = (200, 200),
                 embed_dims: int = 256, num_layers: int = 6, num_heads: int = 8,
                 num_cams: int = 6, num_levels: int = 4, num_pillar_points: int = 4,
                 num_points: int = 8, feedforward_channels: int = 512, dropout: float = 0.1,
                 with_cp: bool = False) -> None:
        super().__init__()
        self.pc_range = check_range('BEVFormerV2Encoder', pc_range)
        if num_points % num_pillar_points:
            raise InvalidValue('BEVFormerV2Encoder: num_points must be a multiple of '
                               f'num_pillar_points ({num_pillar_points}), got {num_points}')
        if embed_dims % 2 or embed_dims % num_heads:
            raise InvalidValue('BEVFormerV2Encoder: embed_dims must be even and a multiple of '
                               f'num_heads ({num_heads}), got {embed_dims}')
        self.bev_size, self.embed_dims = (bev_size[0], bev_size[1]), embed_dims
        self.num_cams, self.num_levels, self.with_cp = num_cams, num_levels, with_cp
        rows, columns = self.bev_size
        self.bev_embedding = nn.Embedding(rows * columns, embed_dims)
        self.positional_encoding = LearnedPositionalEncoding(embed_dims // 2, rows, columns,
                                                             init_cfg=None)
        self.cam_embed = nn.Parameter(torch.empty(num_cams, embed_dims))
        self.level_embed = nn.Parameter(torch.empty(num_levels, embed_dims))
        cross_attn = dict(num_heads=num_heads, num_levels=num_levels, num_points=num_points)
        self.layers = nn.ModuleList(
            BEVEncoderLayer(embed_dims, feedforward_channels, dropout,
                            dict(num_heads=num_heads), cross_attn) for _ in range(num_layers))
        self.register_buffer(
            'pillars', pillar_points(self.pc_range, self.bev_size, num_pillar_points),
            persistent=False)
        unit = (0.0, 0.0, 0.0, 1.0, 1.0, 1.0)
        self.register_buffer('reference', pillar_points(unit, self.bev_size, 1)[:, 0, :2],
                             persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values: xavier matrices, normal embeddings; the attentions reset themselves."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, (nn.Embedding, BEVSelfAttention, SpatialCrossAttention)):
                module.reset_parameters()

    def init_weights(self) -> None:
        """Start values; a second call changes nothing."""
        if not self.is_init:
            self.reset_parameters()
            self._is_init = True

    def _tokens(self, features: Sequence[Tensor]) -> tuple[Tensor, Sizes]:
        """Image tokens (B * V, sum of H_l * W_l, C) with their embeddings, and the map sizes."""
        tokens, sizes = [], []
        for level, maps in enumerate(features):
            sizes.append((maps.shape[-2], maps.shape[-1]))
            flat = maps.flatten(3).transpose(2, 3)  # (B, V, C, h, w) -> (B, V, h*w, C)
            flat = flat + self.cam_embed[:, None] + self.level_embed[level]
            tokens.append(flat.flatten(0, 1))
        return torch.cat(tokens, 1), sizes

    def look(self, lidar2img: Sequence[Tensor], image_size: Sequence[int],
             own_sizes: Sequence[tuple[int, int]] = ()) -> list[VisibleCells]:
        """What the cameras see in each of several frames; at once, since the host waits for it.

        Args:
            lidar2img: for each frame, shape (B, V, 4, 4).
            image_size, own_sizes: as in :meth:`forward`.
        """
        own = self._padded(lidar2img[0].device, image_size, own_sizes)
        return VisibleCells.of([project_points(self.pillars, matrices, image_size, own)
                                for matrices in lidar2img])

    @staticmethod
    def _padded(device: torch.device, image_size: Sequence[int],
                own_sizes: Sequence[tuple[int, int]]) -> Optional[Tensor]:
        """Sizes (B, 2) of the images; None if nothing is padded."""
        if all(size == tuple(image_size) for size in own_sizes):
            return None
        return to_device(np.array(own_sizes), device)

    def _is_image(self, own: Tensor, image_size: Sequence[int], sizes: Sizes) -> Tensor:
        """Which tokens (B * V, sum of H_l * W_l) are no padding."""
        masks = []
        for height, width in sizes:
            rows, columns = (torch.arange(count, device=own.device) * (length / count)
                             for count, length in zip((height, width), image_size))
            inside = (rows < own[:, :1])[:, :, None] & (columns < own[:, 1:])[:, None]
            masks.append(inside.flatten(1))  # (B, h * w): where a token starts in the image
        return torch.cat(masks, 1).repeat_interleave(self.num_cams, 0)

    def forward(self, features: Sequence[Tensor], lidar2img: Tensor, image_size: Sequence[int],
                own_sizes: Sequence[tuple[int, int]] = (),
                cells: Optional[VisibleCells] = None) -> Tensor:
        """Encodes one frame.

        Args:
            features: one map per level, shape (B, V, C, h, w).
            lidar2img: shape (B, V, 4, 4): current LiDAR frame to pixels of this frame.
            image_size: (height, width) in pixels of the padded images.
            own_sizes: (height, width) of the images of each sample, without padding: there no
                cell is visible and no feature is read, so that a sample does not depend on the
                sizes of its neighbours. Empty if nothing is padded.
            cells: what :meth:`look` found for these arguments; None: it is called here.

        Returns:
            Shape (B, Hb * Wb, C).

        Raises:
            ValueError: another number of levels or cameras than the encoder was built for.
        """
        if len(features) != self.num_levels or features[0].shape[1] != self.num_cams:
            raise InvalidValue(
                f'BEVFormerV2Encoder: features must be {self.num_levels} levels of '
                f'{self.num_cams} cameras, got {len(features)} of {features[0].shape[1]}')
        batch = features[0].shape[0]
        tokens, sizes = self._tokens(features)
        if cells is None:
            cells, = self.look([lidar2img], image_size, own_sizes)
        own = self._padded(lidar2img.device, image_size, own_sizes)
        if own is not None:
            cells = replace(cells, is_image=self._is_image(own, image_size, sizes))
        query = self.bev_embedding.weight[None].expand(batch, -1, -1)
        rows, columns = self.bev_size
        pos = self.positional_encoding(query.new_zeros(1, rows, columns))
        pos = pos.flatten(2).transpose(1, 2)  # (1, C, Hb, Wb) -> (1, Hb*Wb, C)
        for layer in self.layers:
            inputs = (query, pos, self.reference, self.bev_size, tokens, cells, sizes)
            if self.with_cp and torch.is_grad_enabled():
                query = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                query = layer(*inputs)
        return query


@MODELS.register_module()
class TemporalFusion(BaseModule):
    """Residual blocks over the BEV features of all frames, side by side in the channels.

    Args:
        num_frames: frames T.
        bev_size: (Hb, Wb).
        embed_dims: width C of one frame and of the result.
        inter_channels: width of the blocks; T * C by default.
        num_blocks: residual blocks.
        norm_cfg: norm of the blocks.
    """

    def __init__(self, num_frames: int, bev_size: Sequence[int], embed_dims: int = 256,
                 inter_channels: Optional[int] = None, num_blocks: int = 3,
                 norm_cfg: Union[dict, None] = None) -> None:
        super().__init__()
        if num_frames < 2:
            raise InvalidValue(f'TemporalFusion: num_frames must be 2 or more, got {num_frames}')
        norm_cfg = dict(type='BN') if norm_cfg is None else norm_cfg
        self.bev_size, self.embed_dims = (bev_size[0], bev_size[1]), embed_dims
        channels = num_frames * embed_dims
        width = channels if inter_channels is None else inter_channels
        shortcut = None
        if width != channels:
            shortcut = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False),
                                     build_norm_layer(norm_cfg, width)[1])
        self.blocks = nn.ModuleList([BasicBlock(channels, width, downsample=shortcut,
                                                norm_cfg=norm_cfg)])
        self.blocks.extend(BasicBlock(width, width, norm_cfg=norm_cfg)
                           for _ in range(num_blocks - 1))
        self.proj = nn.Linear(width, embed_dims)
        self.norm = nn.LayerNorm(embed_dims)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values: xavier matrices and convolutions."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def init_weights(self) -> None:
        """Start values; a second call changes nothing."""
        if not self.is_init:
            self.reset_parameters()
            self._is_init = True

    def forward(self, frames: Sequence[Tensor]) -> Tensor:
        """Maps T features (B, Hb * Wb, C), in ascending order of time, to (B, Hb * Wb, C)."""
        x = torch.cat(list(frames), -1).transpose(1, 2).unflatten(2, self.bev_size).contiguous()
        for block in self.blocks:
            x = block(x)  # (B, width, Hb, Wb)
        return self.norm(self.proj(x.flatten(2).transpose(1, 2)))
