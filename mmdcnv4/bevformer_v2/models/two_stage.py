# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""BEVFormer v2 in two stages: boxes of the perspective head become queries of the BEV head.

Source:   "BEVFormer v2", arXiv:2211.10439, section 3.3, hybrid object queries.
Differs:  the paper gives the reference points alone. That the height comes from the box, the
          embedding by rank, the position from a sine code, the start after some iterations, and
          the same proposals for every group, are choices of this package. The released system
          has no second stage, and its published numbers are from one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Optional

import torch
from mmdet3d.registry import MODELS
from mmengine.model import BaseModule
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ...errors import InvalidValue
from ..geometry import check_range
from .bev_head import ExtraQueries
from .detector import BEVFormerV2, Geometry, without_training

_EDGE = 0.01  # references keep this distance to the border, in ranges


def sine_code(points: Tensor, channels: int) -> Tensor:
    """Sines and cosines (..., channels) of points (..., 2) in [0, 1]; `channels` is 4 * n."""
    count = channels // 4
    exponents = torch.arange(count, device=points.device) / max(count, 1)
    angles = points[..., None] * 2 * math.pi * 100**exponents  # (..., 2, n)
    return torch.cat([angles.sin(), angles.cos()], -1).flatten(-2)


@MODELS.register_module()
class ProposalQueries(BaseModule):
    """Queries at the places of proposed boxes; the r-th best box has the r-th embedding.

    Args:
        pc_range: (x_min, y_min, z_min, x_max, y_max, z_max) in metres, LiDAR frame.
        num_proposals: queries k per sample.
        embed_dims: width C; a multiple of 4.
        start_iteration: training iterations before proposals are used: they are noise at first.
    """

    def __init__(self, pc_range: Sequence[float], num_proposals: int = 100,
                 embed_dims: int = 256, start_iteration: int = 2000) -> None:
        super().__init__()
        if embed_dims % 4:
            raise InvalidValue('ProposalQueries: embed_dims must be a multiple of 4, '
                               f'got {embed_dims}')
        self.num_proposals, self.start_iteration = num_proposals, start_iteration
        self.embed_dims = embed_dims
        low, high = torch.tensor(check_range('ProposalQueries', pc_range)).split(3)
        self.register_buffer('range_low', low, persistent=False)
        self.register_buffer('range_size', high - low, persistent=False)
        self.register_buffer('iteration', torch.zeros((), dtype=torch.long))
        self.proposal_embedding = nn.Embedding(num_proposals, 2 * embed_dims)
        self.position = nn.Sequential(nn.Linear(embed_dims, embed_dims), nn.ReLU(inplace=True),
                                      nn.Linear(embed_dims, embed_dims))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values; the place starts without effect on the position."""
        self.proposal_embedding.reset_parameters()
        first: Any = self.position[0]
        last: Any = self.position[2]
        nn.init.xavier_uniform_(first.weight)
        nn.init.zeros_(first.bias)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def init_weights(self) -> None:
        """Start values; a second call changes nothing."""
        if not self.is_init:
            self.reset_parameters()
            self._is_init = True

    def forward(self, proposals: Sequence[InstanceData],
                bda_mat: Optional[Tensor] = None) -> ExtraQueries:
        """Queries for B samples.

        Args:
            proposals: `bboxes_3d` of each sample in descending order of score; those beyond
                `num_proposals` are left out.
            bda_mat: shape (B, 3, 3): moves the boxes as the BEV features are moved; None for not.
        """
        batch, device = len(proposals), self.range_low.device
        if self.training:
            self.iteration += 1
        is_started = (self.iteration > self.start_iteration) | (not self.training)
        centers = torch.zeros(batch, self.num_proposals, 3, device=device)
        is_valid = torch.zeros(batch, self.num_proposals, dtype=torch.bool, device=device)
        for index, sample in enumerate(proposals):
            own = sample.bboxes_3d.gravity_center[:self.num_proposals].to(centers)
            if bda_mat is not None:
                own = own @ bda_mat[index].to(centers).T
            centers[index, :len(own)] = own
            is_valid[index, :len(own)] = is_started
        reference = ((centers - self.range_low) / self.range_size).clamp(_EDGE, 1 - _EDGE)
        reference = reference.detach()
        pos, query = self.proposal_embedding.weight.expand(batch, -1, -1).chunk(2, -1)
        place = self.position(sine_code(reference[..., :2], self.embed_dims))
        return ExtraQueries(query, pos + place * is_valid[..., None], reference, is_valid)


@MODELS.register_module()
class TwoStageBEVFormerV2(BEVFormerV2):
    """BEVFormer v2 whose BEV head also starts from the boxes of the perspective head.

    Args:
        proposals: see :class:`ProposalQueries`.
        kwargs: of :class:`BEVFormerV2`, which refuses unknown ones; `perspective_head` is needed.
    """

    def __init__(self, proposals: dict, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if self.perspective_head is None:
            raise InvalidValue('TwoStageBEVFormerV2: perspective_head must be given, got None')
        self.proposals = MODELS.build(proposals)

    def _extra_queries(self, maps: Sequence[Tensor], geometry: Geometry) -> ExtraQueries:
        """Queries from the current frame, without gradient through the boxes."""
        head: Any = self.perspective_head
        with without_training(head):
            boxes = head.predict(maps, geometry.cam2img, geometry.lidar2cam)
        return self.proposals(boxes, geometry.bda_mat if self.training else None)
