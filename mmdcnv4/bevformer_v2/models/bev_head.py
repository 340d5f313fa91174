# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""BEV head: object queries read the BEV features and become boxes, without suppression.

Source:   "BEVFormer v2", arXiv:2211.10439, section 3.3; the decoder is that of "Deformable DETR",
          arXiv:2010.04159, with box refinement; several groups of queries in training as in
          "Group DETR", Chen et al., ICCV 2023, arXiv:2207.13085.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Optional

import numpy as np
import torch
from mmcv.cnn.bricks.transformer import FFN, MultiheadAttention
from mmdet.models.layers import inverse_sigmoid
from mmdet.utils import reduce_mean
from mmdet3d.registry import MODELS, TASK_UTILS
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.model import BaseModule
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import InvalidValue
from ...models.layers.multi_scale_attention import MultiScaleAttention
from ..geometry import check_range, constant, to_device
from .attention import deformable_attention
from .box_code import CODE_SIZE, encode_boxes, raw_center, select_boxes

_PRIOR = 0.01  # probability of an object that an untrained query states


@dataclass(frozen=True)
class ExtraQueries:
    """Queries of single samples, beside the learned ones of all samples.

    Attributes:
        query, pos: content and position, shape (B, k, C).
        reference: shape (B, k, 3), x, y, z in [0, 1].
        is_valid: shape (B, k): False where the reference is that of `pos` instead.
    """

    query: Tensor
    pos: Tensor
    reference: Tensor
    is_valid: Tensor


class BEVCrossAttention(MultiScaleAttention):
    """On one map whose size the host knows: it need not be read back from the device."""

    def forward(  # type: ignore[override]
            self, query: Tensor, query_pos: Tensor, bev: Tensor, bev_size: tuple[int, int],
            reference: Tensor) -> Tensor:
        """Maps (B, Q, C) to (B, Q, C), the residual sum included, in float32.

        Args:
            query, query_pos: shape (B, Q, C).
            bev: shape (B, Hb * Wb, C).
            bev_size: (Hb, Wb).
            reference: shape (B, Q, 2), x, y in [0, 1].
        """
        with torch.autocast(query.device.type, enabled=False):  # exact sampling locations
            query, located = query.float(), query.float() + query_pos.float()
            shapes = constant(located, bev_size)[None]  # (1, 2)
            locations = self._locations(located, reference[:, :, None], shapes)
            value = self.value_proj(bev.float()).unflatten(-1, (self.num_heads, -1))
            out = deformable_attention(value, [bev_size], locations, self._weights(located))
            return query + self.dropout(self.output_proj(out))


class GroupDecoderLayer(nn.Module):
    """Self-attention inside each group of queries, cross-attention to the BEV features, FFN.

    Args:
        embed_dims: width C.
        num_heads: heads of both attentions.
        num_points: points per head of the cross-attention.
        feedforward_channels: hidden width of the FFN.
        dropout: in all branches.
        with_cp: recompute the layer in the backward pass to save memory.
    """

    def __init__(self, embed_dims: int, num_heads: int = 8, num_points: int = 4,
                 feedforward_channels: int = 512, dropout: float = 0.1,
                 with_cp: bool = False) -> None:
        super().__init__()
        self.with_cp = with_cp
        self.self_attn = MultiheadAttention(
            embed_dims, num_heads, attn_drop=dropout, batch_first=True,
            dropout_layer=dict(type='Dropout', drop_prob=dropout))
        self.cross_attn = BEVCrossAttention(
            embed_dims, num_heads, num_levels=1, num_points=num_points, dropout=dropout,
            batch_first=True)
        self.ffn = FFN(embed_dims, feedforward_channels, ffn_drop=dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dims) for _ in range(3))

    def forward(self, query: Tensor, query_pos: Tensor, num_groups: int, bev: Tensor,
                bev_size: tuple[int, int], reference: Tensor) -> Tensor:
        """Maps (B, G * Q, C) to (B, G * Q, C).

        Args:
            query, query_pos: shape (B, G * Q, C).
            num_groups: G; groups do not see each other.
            bev: shape (B, Hb * Wb, C).
            bev_size: (Hb, Wb).
            reference: shape (B, G * Q, 2), x, y in [0, 1].
        """
        inputs = (query, query_pos, num_groups, bev, bev_size, reference)
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(self._forward, *inputs, use_reentrant=False)
        return self._forward(*inputs)

    def _attend(self, query: Tensor, pos: Tensor) -> Tensor:
        """Self-attention of (M, Q, C) with the residual sum.

        The module of mmcv would keep the Q x Q weights of every head for the backward pass.
        """
        attn = self.self_attn
        located = (query + pos).transpose(0, 1)  # (Q, M, C)
        out, _ = attn.attn(located, located, query.transpose(0, 1), need_weights=False)
        return query + attn.dropout_layer(attn.proj_drop(out.transpose(0, 1)))

    def _forward(self, query: Tensor, query_pos: Tensor, num_groups: int, bev: Tensor,
                 bev_size: tuple[int, int], reference: Tensor) -> Tensor:
        batch = len(query)
        # (B, G*Q, C) -> (B*G, Q, C)
        groups, pos = (x.unflatten(1, (num_groups, -1)).flatten(0, 1) for x in (query, query_pos))
        groups = self._attend(groups, pos)
        query = self.norms[0](groups.unflatten(0, (batch, num_groups)).flatten(1, 2))
        query = self.cross_attn(query, query_pos, bev, bev_size, reference)
        return self.norms[2](self.ffn(self.norms[1](query)))


def _branch(embed_dims: int, out_channels: int, with_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(2):
        layers.append(nn.Linear(embed_dims, embed_dims))
        layers += [nn.LayerNorm(embed_dims)] if with_norm else []
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers, nn.Linear(embed_dims, out_channels))


@MODELS.register_module()
class BEVFormerV2Head(BaseModule):
    """Decoder, losses and predictions on BEV features.

    Args:
        num_classes: classes K.
        pc_range: (x_min, y_min, z_min, x_max, y_max, z_max) in metres, LiDAR frame.
        bev_size: (Hb, Wb).
        embed_dims: width C.
        num_layers: decoder layers.
        num_queries: queries Q of a group.
        num_groups: groups G in training; predictions come from the first.
        layer_cfg: arguments of :class:`GroupDecoderLayer` besides `embed_dims`.
        loss_cls: classification loss.
        loss_bbox: loss on box codes, averaged over the matched queries.
        train_cfg: `assigner` and `code_weights` (ten factors on the entries of a code).
        test_cfg: `max_per_sample` and `post_center_range` (six numbers in metres).
    """

    def __init__(self, num_classes: int, pc_range: Sequence[float], bev_size: Sequence[int],
                 embed_dims: int = 256, num_layers: int = 6, num_queries: int = 900,
                 num_groups: int = 1, layer_cfg: dict[str, Any] | None = None,
                 loss_cls: dict[str, Any] | None = None, loss_bbox: dict[str, Any] | None = None,
                 train_cfg: dict[str, Any] | None = None,
                 test_cfg: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.pc_range = check_range('BEVFormerV2Head', pc_range)
        self.bev_size, self.embed_dims = (bev_size[0], bev_size[1]), embed_dims
        self.num_queries, self.num_groups = num_queries, num_groups
        self.query_embedding = nn.Embedding(num_groups * num_queries, 2 * embed_dims)
        self.reference = nn.Linear(embed_dims, 3)
        self.layers = nn.ModuleList(GroupDecoderLayer(embed_dims, **(layer_cfg or {}))
                                    for _ in range(num_layers))
        self.cls_branches = nn.ModuleList(_branch(embed_dims, num_classes, with_norm=True)
                                          for _ in range(num_layers))
        self.reg_branches = nn.ModuleList(_branch(embed_dims, CODE_SIZE, with_norm=False)
                                          for _ in range(num_layers))
        self.loss_cls = MODELS.build(loss_cls or dict(
            type='mmdet.FocalLoss', use_sigmoid=True, gamma=2.0, alpha=0.25, loss_weight=2.0))
        self.loss_bbox = MODELS.build(loss_bbox or dict(
            type='mmdet.SmoothL1Loss', beta=1.0, loss_weight=0.75))
        train_cfg = train_cfg or {}
        self.assigner = TASK_UTILS.build(train_cfg.get('assigner') or dict(
            type='mmdet.HungarianAssigner', match_costs=[
                dict(type='mmdet.FocalLossCost', weight=2.0),
                dict(type='mmdet3d.BBox3DCodeSmoothL1Cost', weight=0.75)]))
        code_weights = train_cfg.get('code_weights', [1.0] * 8 + [0.2] * 2)
        self.register_buffer('code_weights', torch.tensor(code_weights), persistent=False)
        self.test_cfg = {'max_per_sample': 300,
                         'post_center_range': [-61.2, -61.2, -10.0, 61.2, 61.2, 10.0],
                         **(test_cfg or {})}
        low, high = torch.tensor(self.pc_range).split(3)
        self.register_buffer('range_low', low, persistent=False)
        self.register_buffer('range_size', high - low, persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values: xavier matrices in the decoder, normal queries, rare objects.

        The branches keep torch's, which are smaller: a refinement starts with steps of metres,
        where xavier matrices would throw the reference across the plane in every layer.
        """
        for parameter in (*self.layers.parameters(), *self.reference.parameters()):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in (*self.cls_branches.modules(), *self.reg_branches.modules()):
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
        self.query_embedding.reset_parameters()
        nn.init.zeros_(self.reference.bias)
        for module in self.modules():
            if isinstance(module, MultiScaleAttention):
                module.init_weights()
        branch: Any
        for branch in self.cls_branches:
            nn.init.constant_(branch[-1].bias, -math.log((1 - _PRIOR) / _PRIOR))

    def init_weights(self) -> None:
        """Start values; a second call changes nothing."""
        if not self.is_init:
            self.reset_parameters()
            self._is_init = True

    @property
    def _groups(self) -> int:
        """Groups in this mode."""
        return self.num_groups if self.training else 1

    def _queries(self, batch: int, extra: Optional[ExtraQueries]) -> tuple[Tensor, Tensor, Tensor]:
        """Content, position (B, G * Q, C) and reference (B, G * Q, 3); each group gets `extra`."""
        groups = self._groups
        embedding = self.query_embedding.weight[:groups * self.num_queries]
        embedding = embedding.unflatten(0, (groups, -1)).expand(batch, -1, -1, -1)
        pos, query = embedding.chunk(2, -1)  # (B, G, Q, C)
        if extra is not None:
            query, pos = (torch.cat([own, more[:, None].expand(-1, groups, -1, -1)], 2)
                          for own, more in ((query, extra.query), (pos, extra.pos)))
        reference = self.reference(pos).float().sigmoid()  # (B, G, Q, 3) in [0, 1]
        if extra is not None:
            given = torch.where(extra.is_valid[:, None, :, None], extra.reference[:, None],
                                reference[:, :, self.num_queries:])
            reference = torch.cat([reference[:, :, :self.num_queries], given], 2)
        return query.flatten(1, 2), pos.flatten(1, 2), reference.flatten(1, 2)

    def forward(self, bev: Tensor, extra: Optional[ExtraQueries] = None) -> tuple[Tensor, Tensor]:
        """Runs the decoder; all groups in training mode, else the first.

        Args:
            bev: shape (B, Hb * Wb, C).
            extra: k queries more in each group, so that Q below includes them.

        Returns:
            Logits (layers, B, G * Q, K) and codes (layers, B, G * Q, 10), float32.
        """
        groups = self._groups
        query, pos, reference = self._queries(len(bev), extra)
        logits, codes = [], []
        for layer, classify, regress in zip(self.layers, self.cls_branches, self.reg_branches):
            query = layer(query, pos, groups, bev, self.bev_size, reference[..., :2])
            raw = regress(query).float()
            center = (raw_center(raw) + inverse_sigmoid(reference)).sigmoid()
            metres = center * self.range_size + self.range_low
            codes.append(torch.cat([metres[..., :2], raw[..., 2:4], metres[..., 2:], raw[..., 5:]],
                                   -1))
            logits.append(classify(query).float())
            reference = center.detach()
        return torch.stack(logits), torch.stack(codes)

    def loss(self, bev: Tensor, data_samples: Sequence[Any],
             extra: Optional[ExtraQueries] = None) -> dict[str, Tensor]:
        """Losses of all decoder layers.

        Args:
            bev: shape (B, Hb * Wb, C).
            data_samples: B samples with `gt_instances_3d`: `bboxes_3d` (n, 9) and `labels_3d`.
            extra: as in :meth:`forward`.

        Returns:
            `loss_cls` and `loss_bbox` of the last layer, `d0.loss_cls` ... of the others.

        Raises:
            ValueError: a label is no class of this head.
        """
        logits, codes = self(bev, extra)
        objects = [self._objects(sample.gt_instances_3d, bev.device) for sample in data_samples]
        assigned = self._assign(logits.detach(), codes.detach(), objects)
        losses = {}
        for index, layer in enumerate(zip(logits, codes, assigned)):
            prefix = f'd{index}.' if index + 1 < len(logits) else ''
            loss_cls, loss_bbox = self._layer_loss(*layer, objects)
            losses[prefix + 'loss_cls'] = torch.nan_to_num(loss_cls)
            losses[prefix + 'loss_bbox'] = torch.nan_to_num(loss_bbox)
        return losses

    @staticmethod
    def _objects(instances: InstanceData, device: torch.device) -> InstanceData:
        """`bboxes`, codes (n, 10), and `labels` of a sample."""
        boxes = instances.bboxes_3d
        boxes = torch.cat([boxes.gravity_center, boxes.tensor[:, 3:]], -1).to(device)
        return InstanceData(bboxes=encode_boxes(boxes.float()),
                            labels=instances.labels_3d.to(device))

    def _costs(self, logits: Tensor, codes: Tensor, objects: InstanceData) -> Tensor:
        """Costs (layers, G * Q, n) of the predictions of a sample for its objects."""
        truth = InstanceData(bboxes=objects.bboxes,
                             labels=objects.labels.clamp(0, self.num_classes - 1))
        layers = []  # one at a time: the difference of all codes would take gigabytes
        for layer_logits, layer_codes in zip(logits, codes):
            predictions = InstanceData(scores=torch.nan_to_num(layer_logits),
                                       bboxes=torch.nan_to_num(layer_codes))
            layers.append(torch.stack([cost(predictions, truth)
                                       for cost in self.assigner.match_costs]).sum(0))
        return torch.stack(layers)

    def _assign(self, logits: Tensor, codes: Tensor, objects: Sequence[InstanceData]) -> Tensor:
        """Which object each query of each layer stands for, at least cost within each group.

        The costs of all layers, samples and groups go to the host together, and so do their
        results to the device: the host waits once.

        Args:
            logits: shape (layers, B, G * Q, K).
            codes: shape (layers, B, G * Q, 10).
            objects: of the B samples.

        Returns:
            Shape (layers, B, G * Q): rows of the objects of all samples together, -1 for none.

        Raises:
            ValueError: a label is no class of this head.
        """
        groups = self._groups
        assigned = np.full(logits.shape[:3], -1)
        counts = [len(sample) for sample in objects]
        if not sum(counts):
            return to_device(assigned, logits.device)
        layers, _, queries = assigned.shape
        costs = [self._costs(logits[:, index], codes[:, index], sample).flatten()
                 for index, sample in enumerate(objects)]
        labels = torch.cat([sample.labels for sample in objects])
        on_host = torch.cat([labels.to(costs[0].dtype), *costs]).cpu().numpy()
        self._check_labels(on_host[:len(labels)])
        start, first = len(labels), 0
        for sample, count in enumerate(counts):
            end = start + layers * queries * count
            matrices = on_host[start:end].reshape(layers, groups, queries // groups, count)
            results = assigned[:, sample].reshape(layers, groups, -1)  # a view
            for layer, group in np.ndindex(layers, groups):
                rows, columns = linear_sum_assignment(matrices[layer, group])
                results[layer, group, rows] = first + columns
            start, first = end, first + count
        return to_device(assigned, logits.device)

    def _check_labels(self, labels: np.ndarray) -> None:
        if not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise InvalidValue(
                f'BEVFormerV2Head: labels must be 0 ... {self.num_classes - 1} (num_classes), got '
                f'{int(labels.min())} ... {int(labels.max())}; do the classes of the dataset '
                'match the model?')

    def _targets(self, assigned: Tensor,
                 objects: Sequence[InstanceData]) -> tuple[Tensor, Tensor, Tensor]:
        """Labels (m,), codes (m, 10) and weights (m, 10) of queries with these objects (m,)."""
        nothing = objects[0].bboxes.new_zeros(1, CODE_SIZE)  # the last row, which -1 takes
        codes = torch.cat([*(sample.bboxes for sample in objects), nothing])
        is_finite = codes.isfinite()
        weights = self.code_weights * is_finite
        weights = torch.cat([weights[:-1], nothing])
        labels = torch.cat([*(sample.labels for sample in objects),
                            assigned.new_full((1,), self.num_classes)])
        return labels[assigned], codes.where(is_finite, 0)[assigned], weights[assigned]

    def _layer_loss(self, logits: Tensor, codes: Tensor, assigned: Tensor,
                    objects: Sequence[InstanceData]) -> tuple[Tensor, Tensor]:
        """Losses of one layer: (B, G * Q, K) and (B, G * Q, 10), mean over the groups."""
        groups = self._groups
        labels, boxes, weights = self._targets(assigned.flatten(), objects)
        # every group has the same number of matches
        matched = (labels < self.num_classes).sum() / groups
        factor = reduce_mean(matched.float()).clamp(min=1) * groups
        loss_cls = self.loss_cls(logits.flatten(0, 1), labels, avg_factor=factor)
        # with weights and a reduction mmdet's loss would look whether a weight is not zero
        loss_bbox = self.loss_bbox(codes.flatten(0, 1), boxes, reduction_override='none') * weights
        return loss_cls, loss_bbox.sum() / (factor + torch.finfo(torch.float32).eps)

    def predict(self, bev: Tensor, extra: Optional[ExtraQueries] = None) -> list[InstanceData]:
        """Boxes of the last layer and the first group; arguments as in :meth:`forward`.

        Returns:
            Per sample `bboxes_3d` (9 numbers, LiDAR frame), `scores_3d`, `labels_3d`.
        """
        logits, codes = self(bev, extra)
        size = logits.shape[2] // self._groups
        results = []
        for sample_logits, sample_codes in zip(logits[-1], codes[-1]):
            boxes, scores, labels = select_boxes(
                sample_logits[:size], sample_codes[:size], **self.test_cfg)
            boxes[:, 2] -= boxes[:, 5] * 0.5  # mmdet3d's boxes stand on their centre
            results.append(InstanceData(
                bboxes_3d=LiDARInstance3DBoxes(boxes, box_dim=9),
                scores_3d=scores, labels_3d=labels))
        return results
