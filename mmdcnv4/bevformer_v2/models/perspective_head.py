# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Perspective head: one 3-D box per pixel of a camera image, which teaches the backbone depth.

Source:   "BEVFormer v2", arXiv:2211.10439, section 3.2; the head is that of DD3D,
          arXiv:2108.06417, section 3.
Differs:  all images take part, also those without an object; rare classes at the start; depth has
          no upper limit in training (`clamp_depth_in_train`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
import torch.nn.functional as F
from mmcv.cnn import Scale, build_norm_layer
from mmcv.ops import batched_nms
from mmdet.models.losses import FocalLoss
from mmdet.utils import reduce_mean
from mmdet3d.models.layers import nms_bev
from mmdet3d.registry import MODELS
from mmdet3d.structures import LiDARInstance3DBoxes, xywhr2xyxyr
from mmengine.model import BaseModule
from mmengine.structures import InstanceData
from torch import Tensor, nn

from ...errors import InvalidValue
from ..geometry import camera_boxes_to_lidar
from ..targets.perspective_targets import Locations, assign_images, distances
from .perspective_losses import (
    CameraBoxes,
    centerness,
    confidence_target,
    decode,
    disentangled_losses,
    giou_loss,
)

# name -> (tower, channels, per class); `depth` alone has no bias
PREDICTORS = {
    'cls': ('cls', 1, True), 'attr': ('cls', 3, False), 'speed': ('cls', 1, False),
    'box2d': ('box2d', 4, False), 'centerness': ('box2d', 1, False),
    'quat': ('box3d', 4, True), 'proj_ctr': ('box3d', 2, True), 'depth': ('box3d', 1, True),
    'size': ('box3d', 3, True), 'conf3d': ('box3d', 1, True),
}
BOX3D = ('quat', 'proj_ctr', 'depth', 'size')
IGNORED_ATTRIBUTE = 3
# class -> mean width, length, height in metres on nuScenes
CANONICAL_SIZES: dict[str, Sequence[float]] = dict(
    barrier=(2.3524184, 0.5062202, 1.0413622), bicycle=(0.61416006, 1.7016163, 1.3054738),
    bus=(2.9139307, 10.725025, 3.2832346), car=(1.9751819, 4.641267, 1.74352),
    construction_vehicle=(2.772134, 6.565072, 3.2474296),
    motorcycle=(0.7800532, 2.138673, 1.4437162), pedestrian=(0.6667362, 0.7181772, 1.7616143),
    traffic_cone=(0.40246472, 0.4027083, 1.0084083), trailer=(3.0059454, 12.8197, 4.1213827),
    truck=(2.4986045, 6.9310856, 2.8382742))
_LOSS_WEIGHTS = dict(cls=1.0, box2d=1.0, centerness=1.0, box3d=2.0, conf3d=1.0, attr=0.2,
                     speed=0.2)
_TRAIN_CFG = dict(center_radius=1.5, clamp_depth_in_train=False, ranges=(
    (-1, 64), (64, 128), (128, 256), (256, 512), (512, 1e8)))
_TEST_CFG = dict(score_thr=0.05, nms_pre=1000, nms_thr=0.75, max_per_img=100, bev_nms_thr=0.3,
                 max_per_sample=100)
_PRIOR = 0.01  # probability of an object that an untrained pixel states


class Candidates(NamedTuple):
    """Pixels of an image that may be objects: index, label and 2-D score, each of shape (n,)."""

    pixels: Tensor
    labels: Tensor
    scores: Tensor


class Tower(nn.Module):
    """3x3 convolutions shared by all levels, with a norm of its own for each level.

    Args:
        channels: width C.
        num_convs: convolutions.
        num_levels: levels.
        norm_cfg: norm layer.
    """

    def __init__(self, channels: int, num_convs: int, num_levels: int, norm_cfg: dict) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1, bias=False)
                                   for _ in range(num_convs))
        self.norms = nn.ModuleList(
            nn.ModuleList(build_norm_layer(norm_cfg, channels)[1] for _ in range(num_levels))
            for _ in range(num_convs))

    def forward(self, x: Tensor, level: int) -> Tensor:
        """Maps (M, C, h, w) to (M, C, h, w)."""
        norms: Any
        for conv, norms in zip(self.convs, self.norms):
            x = F.relu(norms[level](conv(x)))
        return x


@MODELS.register_module()
class PerspectiveHead(BaseModule):
    """Per-pixel 3-D detector on the maps of single cameras; it does not know which camera.

    Args:
        num_classes: classes K.
        in_channels: width of the maps.
        strides: of the levels, in pixels.
        num_convs: convolutions per tower.
        norm_cfg: norm layer of the towers.
        depth_mean, depth_std: per level, of the depth of objects in metres; start values.
        depth_range: smallest and largest depth in metres.
        classes: names of the classes in the order of the labels; those of the dataset.
        canonical_sizes: name to mean width, length, height in metres, for classes that are not
            in `CANONICAL_SIZES`, or with other sizes.
        loss_weights: factors on `cls`, `box2d`, `centerness`, `box3d` (each of four terms),
            `conf3d`, `attr`, `speed`.
        train_cfg: `ranges` (per level, of the largest side distance in pixels),
            `center_radius` (strides), `clamp_depth_in_train`.
        test_cfg: `score_thr`, `nms_pre` (per level), `nms_thr`, `max_per_img`, `bev_nms_thr`,
            `max_per_sample`.

    Raises:
        ValueError: another number of classes, or a class without a size.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 256,
                 strides: Sequence[int] = (8, 16, 32, 64, 128), num_convs: int = 4,
                 norm_cfg: Optional[dict] = None,
                 depth_mean: Sequence[float] = (44.921, 20.252, 11.712, 7.166, 8.548),
                 depth_std: Sequence[float] = (24.331, 9.833, 6.223, 4.611, 8.275),
                 depth_range: Sequence[float] = (0.1, 80.0),
                 classes: Sequence[str] = tuple(CANONICAL_SIZES),
                 canonical_sizes: Optional[dict[str, Sequence[float]]] = None,
                 loss_weights: Optional[dict] = None, train_cfg: Optional[dict] = None,
                 test_cfg: Optional[dict] = None) -> None:
        super().__init__()
        if len(classes) != num_classes:
            raise InvalidValue(f'PerspectiveHead: classes must be num_classes ({num_classes}) '
                               f'names, got {tuple(classes)}')
        self.classes = tuple(classes)
        norm_cfg = dict(type='BN') if norm_cfg is None else norm_cfg
        self.num_classes, self.strides = num_classes, tuple(strides)
        self.depth_range = (float(depth_range[0]), float(depth_range[1]))
        self.loss_weights = {**_LOSS_WEIGHTS, **(loss_weights or {})}
        self.train_cfg = {**_TRAIN_CFG, **(train_cfg or {})}
        self.test_cfg = {**_TEST_CFG, **(test_cfg or {})}
        self.register_buffer('canonical_sizes', _sizes_of(classes, canonical_sizes),
                             persistent=False)
        levels = len(self.strides)
        self.towers = nn.ModuleDict({
            name: Tower(in_channels, num_convs, levels, norm_cfg)
            for name in ('cls', 'box2d', 'box3d')})
        self.predictors = nn.ModuleDict({
            name: nn.Conv2d(in_channels, channels * (num_classes if per_class else 1), 3,
                            padding=1, bias=name != 'depth')
            for name, (_, channels, per_class) in PREDICTORS.items()})
        starts = dict(box2d=strides, proj_ctr=strides, size=[1.0] * levels, conf3d=[1.0] * levels,
                      depth=[0.3 * deviation for deviation in depth_std[:levels]])
        self.scales = nn.ModuleDict({
            name: nn.ModuleList(Scale(float(value)) for value in values)
            for name, values in starts.items()})
        self.depth_offsets = nn.Parameter(torch.tensor(depth_mean[:levels]))
        self.focal_loss = FocalLoss(use_sigmoid=True, gamma=2.0, alpha=0.25)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values of the convolutions."""
        tower: Any
        predictor: Any
        for tower in self.towers.values():
            for conv in tower.convs:
                nn.init.kaiming_normal_(conv.weight, mode='fan_out', nonlinearity='relu')
        for predictor in self.predictors.values():
            nn.init.kaiming_uniform_(predictor.weight, a=1)
            if predictor.bias is not None:
                nn.init.zeros_(predictor.bias)
        predictor = self.predictors['cls']
        nn.init.constant_(predictor.bias, -math.log((1 - _PRIOR) / _PRIOR))

    def init_weights(self) -> None:
        """Start values; a second call changes nothing."""
        if not self.is_init:
            self.reset_parameters()
            self._is_init = True

    def _level(self, x: Tensor, level: int) -> dict[str, Tensor]:
        """Outputs of one level, (M, h * w, channels), float32."""
        features = {name: tower(x, level) for name, tower in self.towers.items()}
        outputs = {}
        scales: Any = self.scales
        for name, (tower, _, _) in PREDICTORS.items():
            out = self.predictors[name](features[tower]).float()
            if name in self.scales:
                out = scales[name][level](out)
            if name == 'depth':
                out = out + self.depth_offsets[level]
            if name in ('box2d', 'speed'):
                out = out.relu()
            outputs[name] = out.flatten(2).transpose(1, 2)  # (M, c, h, w) -> (M, h*w, c)
        return outputs

    def forward(self, features: Sequence[Tensor]) -> dict[str, Tensor]:
        """Raw outputs (M, P, channels) for maps (M, C, h, w); P pixels of all levels."""
        if len(features) != len(self.strides):
            raise InvalidValue(f'PerspectiveHead: features must be {len(self.strides)} levels '
                               f'(strides), got {len(features)}')
        levels = [self._level(x, level) for level, x in enumerate(features)]
        return {name: torch.cat([level[name] for level in levels], 1) for name in PREDICTORS}

    def _locations(self, features: Sequence[Tensor]) -> Locations:
        sizes = [(x.shape[-2], x.shape[-1]) for x in features]
        return Locations.of(sizes, self.strides, self.train_cfg['ranges'], features[0].device)

    def _of_class(self, name: str, rows: Tensor, labels: Tensor) -> Tensor:
        """(n, c) of raw outputs (n, c * K), for one class each; channel order (c, K)."""
        per_class = rows.unflatten(-1, (PREDICTORS[name][1], self.num_classes))
        return per_class[torch.arange(len(rows), device=rows.device), :, labels]

    def _decode(self, rows: dict[str, Tensor], labels: Tensor, points: Tensor, cam2img: Tensor,
                depth_range: tuple[float, float]) -> CameraBoxes:
        raw = {name: self._of_class(name, rows[name], labels) for name in BOX3D}
        return decode(raw, points, self.canonical_sizes[labels], cam2img, depth_range)

    def loss(self, features: Sequence[Tensor], data_samples: Sequence[Any],
             cam2img: Tensor) -> dict[str, Tensor]:
        """Losses on the current frame.

        Args:
            features: one map (B, V, C, h, w) per level.
            data_samples: B samples with `gt_mono`, see `MonoTargets`.
            cam2img: shape (B, V, 3, 3), for the network image.

        Returns:
            `loss_cls`, `loss_box2d_reg`, `loss_centerness`, `loss_box3d_*` (four),
            `loss_conf3d`, `loss_attr`, `loss_speed`. Without any object all but the first are
            zero, with a gradient for every parameter.
        """
        num_cams = features[0].shape[1]
        features = [x.flatten(0, 1) for x in features]
        outputs = self(features)
        locations = self._locations(features)
        with torch.autocast(features[0].device.type, enabled=False):
            rows, objects = assign_images(locations, [s.gt_mono for s in data_samples], num_cams,
                                          self.train_cfg['center_radius'])
            # the one place where the host must wait: how many pixels are positive
            image, pixel = torch.nonzero(rows >= 0, as_tuple=True)
            objects = objects[rows[image, pixel]]
            labels = torch.full_like(rows, self.num_classes)
            labels[image, pixel] = objects.labels
            losses = self._losses(
                outputs, {name: out[image, pixel] for name, out in outputs.items()}, labels,
                locations.points[pixel], cam2img.flatten(0, 1).float()[image], objects)
            anchor = sum(out.sum() for out in outputs.values()) * 0
        return {name: loss + anchor for name, loss in losses.items()}

    def _losses(self, outputs: dict[str, Tensor], positive: dict[str, Tensor], labels: Tensor,
                points: Tensor, cam2img: Tensor, objects: InstanceData) -> dict[str, Tensor]:
        sides = distances(points, objects.bboxes)
        weight = centerness(sides)
        # every rank takes part in these, with objects or without
        count = reduce_mean(weight.new_full((), len(weight))).clamp(min=1)
        total = reduce_mean(weight.sum()).clamp(min=1e-6)
        factor = self.loss_weights
        losses = dict(
            loss_cls=factor['cls'] * self.focal_loss(
                outputs['cls'].flatten(0, 1), labels.flatten(), avg_factor=count),
            loss_box2d_reg=factor['box2d'] * (
                weight * giou_loss(positive['box2d'], sides)).sum() / total,
            loss_centerness=factor['centerness'] * F.binary_cross_entropy_with_logits(
                positive['centerness'][:, 0], weight, reduction='sum') / count)
        limit = self.depth_range[1] if self.train_cfg['clamp_depth_in_train'] else torch.inf
        predicted = self._decode(positive, objects.labels, points, cam2img,
                                 (self.depth_range[0], limit))
        target = CameraBoxes(objects.centers_2d, objects.depths, objects.sizes_wlh, objects.rots,
                             cam2img)
        for name, value in disentangled_losses(predicted, target).items():
            losses[f'loss_box3d_{name}'] = factor['box3d'] * (weight * value).sum() / total
        confidence = F.binary_cross_entropy_with_logits(
            self._of_class('conf3d', positive['conf3d'], objects.labels)[:, 0],
            confidence_target(predicted, target), reduction='none')
        losses['loss_conf3d'] = factor['conf3d'] * (weight * confidence).sum() / total
        losses['loss_attr'] = factor['attr'] * _attribute_loss(positive['attr'], objects.attrs)
        losses['loss_speed'] = factor['speed'] * _speed_loss(positive['speed'][:, 0],
                                                             objects.speeds, weight)
        return losses

    def predict(self, features: Sequence[Tensor], cam2img: Tensor,
                lidar2cam: Tensor) -> list[InstanceData]:
        """Boxes of all cameras of a sample, merged in the LiDAR frame.

        Args:
            features: one map (B, V, C, h, w) per level.
            cam2img: shape (B, V, 3, 3), for the network image.
            lidar2cam: shape (B, V, 4, 4).

        Returns:
            Per sample `bboxes_3d` (7 numbers), `scores_3d` in descending order, `labels_3d`.
        """
        batch, num_cams = features[0].shape[:2]
        features = [x.flatten(0, 1) for x in features]
        outputs, locations = self(features), self._locations(features)
        candidates = self._candidates(outputs, [x.shape[-2] * x.shape[-1] for x in features])
        results = []
        for sample in range(batch):
            boxes, scores, labels = [], [], []
            for cam in range(num_cams):
                index = sample * num_cams + cam
                image_boxes, image_scores, image_labels = self._predict_image(
                    {name: out[index] for name, out in outputs.items()}, locations.points,
                    candidates[index], cam2img[sample, cam].float())
                pose = lidar2cam[sample, cam].float().expand(len(image_labels), 4, 4)
                boxes.append(camera_boxes_to_lidar(image_boxes.centers, image_boxes.sizes,
                                                   image_boxes.rotations, pose))
                scores.append(image_scores)
                labels.append(image_labels)
            results.append(self._merge(torch.cat(boxes), torch.cat(scores), torch.cat(labels)))
        return results

    def _candidates(self, outputs: dict[str, Tensor], counts: Sequence[int]) -> list[Candidates]:
        """Of M images, the best of each level; the host waits once, for how many there are."""
        best = []
        start = 0
        scores = outputs['cls'].sigmoid() * outputs['centerness'].sigmoid()  # (M, P, K)
        for level in scores.split(list(counts), 1):
            values, order = level.flatten(1).topk(
                min(self.test_cfg['nms_pre'], level.shape[1] * self.num_classes))
            best.append((values, start + order // self.num_classes, order % self.num_classes))
            start += level.shape[1]
        values, pixels, labels = (torch.cat(levels, 1) for levels in zip(*best))
        is_above = values > self.test_cfg['score_thr']
        # these first, in their order
        order = is_above.int().argsort(dim=1, descending=True, stable=True)
        columns = [x.gather(1, order) for x in (pixels, labels, values)]
        return [Candidates(*(x[image, :count] for x in columns))
                for image, count in enumerate(is_above.sum(1).tolist())]

    def _predict_image(self, image: dict[str, Tensor], points: Tensor, candidates: Candidates,
                       cam2img: Tensor) -> tuple[CameraBoxes, Tensor, Tensor]:
        """Boxes, scores and labels of one image, after 2-D suppression within each class."""
        cfg = self.test_cfg
        pixel, label, scores_2d = candidates
        rows = {name: out[pixel] for name, out in image.items()}
        confidence = self._of_class('conf3d', rows['conf3d'], label)[:, 0].sigmoid()
        scores = scores_2d.sqrt() * confidence
        points = points[pixel]
        boxes_2d = torch.cat([points - rows['box2d'][:, :2], points + rows['box2d'][:, 2:]], -1)
        keep = pixel  # batched_nms refuses an empty list
        if len(pixel):
            _, keep = batched_nms(boxes_2d, scores, label,
                                  dict(type='nms', iou_threshold=cfg['nms_thr']))
        keep = keep[:cfg['max_per_img']]
        rows = {name: out[keep] for name, out in rows.items()}
        boxes = self._decode(rows, label[keep], points[keep], cam2img.expand(len(keep), 3, 3),
                             self.depth_range)
        return boxes, scores[keep], label[keep]

    def _merge(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> InstanceData:
        """Suppression on the ground plane across cameras, within each class."""
        corners = xywhr2xyxyr(torch.cat([boxes[:, :2], boxes[:, 3:5], boxes[:, 6:]], -1))
        kept = [torch.zeros(0, dtype=torch.long, device=scores.device)]
        classes = torch.arange(self.num_classes, device=labels.device)
        counts = (labels == classes[:, None]).sum(1).tolist()
        for own in labels.argsort(stable=True).split(counts):
            if len(own):
                kept.append(own[nms_bev(corners[own], scores[own], self.test_cfg['bev_nms_thr'])])
        keep = torch.cat(kept)
        keep = keep[scores[keep].argsort(descending=True)][:self.test_cfg['max_per_sample']]
        boxes[:, 2] -= boxes[:, 5] * 0.5  # mmdet3d's boxes stand on their centre
        return InstanceData(bboxes_3d=LiDARInstance3DBoxes(boxes[keep]), scores_3d=scores[keep],
                            labels_3d=labels[keep])


def _sizes_of(classes: Sequence[str], own: Optional[dict[str, Sequence[float]]]) -> Tensor:
    """Mean width, length, height (K, 3) of these classes."""
    sizes = {**CANONICAL_SIZES, **(own or {})}
    unknown = [name for name in classes if name not in sizes]
    if unknown:
        raise InvalidValue(
            f'PerspectiveHead: canonical_sizes must give width, length, height of {unknown}, which '
            'nuScenes has not; set model.perspective_head.canonical_sizes='
            f'dict({unknown[0]}=(w, l, h)) to the means of the training set, in metres, which '
            'tools/analysis_tools/box_sizes.py measures')
    return torch.tensor([list(sizes[name]) for name in classes])


def _attribute_loss(logits: Tensor, attributes: Tensor) -> Tensor:
    """Mean cross-entropy over the pixels whose object has an attribute."""
    is_known = attributes != IGNORED_ATTRIBUTE
    loss = F.cross_entropy(logits, attributes.where(is_known, 0), reduction='none')
    return (loss * is_known).sum() / is_known.sum().clamp(min=1)


def _speed_loss(predicted: Tensor, speeds: Tensor, weight: Tensor) -> Tensor:
    """Smooth-L1 in m/s, weighted, over the pixels whose object has a speed."""
    is_known = speeds.isfinite()
    loss = F.smooth_l1_loss(predicted, speeds.where(is_known, 0), beta=0.05, reduction='none')
    weight = weight * is_known
    return (loss * weight).sum() / weight.sum().clamp(min=1e-6)
