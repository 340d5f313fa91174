# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Perspective head: which pixel stands for what, decoding, losses term by term, predictions."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from mmengine.structures import InstanceData

from mmdcnv4.bevformer_v2 import geometry
from mmdcnv4.bevformer_v2.models.perspective_head import BOX3D, CANONICAL_SIZES, PerspectiveHead
from mmdcnv4.bevformer_v2.models.perspective_losses import (
    CameraBoxes,
    centerness,
    decode,
    disentangled_losses,
    giou_loss,
)
from mmdcnv4.bevformer_v2.targets.perspective_targets import (
    Locations,
    assign_images,
    assign_locations,
)

CPU = torch.device('cpu')
CAM2IMG = torch.tensor([[200.0, 0, 64], [0, 200, 32], [0, 0, 1]])
STRIDES, RANGES = (8, 16), ((-1, 24), (24, 1e8))
SIZES = [(8, 16), (4, 8)]  # of a 64 x 128 image


def locations():
    return Locations.of(SIZES, STRIDES, RANGES, CPU)


def objects_of(boxes, cams, **changes):
    count = len(boxes)
    fields = dict(
        cam_idx=torch.tensor(cams, dtype=torch.long), labels=torch.arange(count),
        bboxes=torch.tensor(boxes).reshape(-1, 4).float(),
        centers_2d=torch.tensor([[60.0, 30.0]]).expand(count, 2),
        depths=torch.full((count,), 12.0), sizes_wlh=torch.tensor([CANONICAL_SIZES['car']] * count
                                                                 ).reshape(-1, 3),
        rots=geometry.yaw_rotation(torch.linspace(0.2, 1, count)),
        attrs=torch.full((count,), 1), speeds=torch.full((count,), 2.0))
    return InstanceData(**{**fields, **changes})


def make_head(**changes):
    torch.manual_seed(0)
    options = dict(in_channels=8, strides=STRIDES, num_convs=1, train_cfg=dict(ranges=RANGES),
                   norm_cfg=dict(type='BN'))
    return PerspectiveHead(**{**options, **changes})


def test_sizes_belong_to_names():
    names = list(CANONICAL_SIZES)[::-1]
    sizes = make_head(classes=names).canonical_sizes
    assert sizes[names.index('bus')].tolist() == pytest.approx(CANONICAL_SIZES['bus'])
    assert torch.equal(sizes, make_head().canonical_sizes.flip(0))
    own = make_head(num_classes=2, classes=['car', 'tram'],
                    canonical_sizes=dict(tram=(2.4, 30, 3.5))).canonical_sizes
    assert own[1].tolist() == pytest.approx([2.4, 30, 3.5])
    with pytest.raises(ValueError, match=r"of \['tram'\], .*canonical_sizes=dict\(tram=\(w, l"):
        make_head(num_classes=2, classes=['car', 'tram'])
    with pytest.raises(ValueError, match='classes must be num_classes .3. names'):
        make_head(num_classes=3)


def test_locations_start_at_the_corner():
    points = locations().points
    assert len(points) == 8 * 16 + 4 * 8
    assert points[[0, 1, 16, 128, 129]].tolist() == [[0, 0], [8, 0], [0, 8], [0, 0], [16, 0]]


def chosen(boxes):
    """{(x, y, stride): row} of all locations that stand for a box."""
    place = locations()
    rows, = assign_locations(place, torch.tensor(boxes).reshape(-1, 4).float(), 1.5)
    return {(*place.points[index].int().tolist(), int(place.strides[index])): int(rows[index])
            for index in torch.nonzero(rows >= 0)[:, 0]}


def test_assignment_by_hand():
    # centre (40, 24); pixels less than 12 from it and inside; largest side at most 24
    assert set(chosen([[20, 12, 60, 36]])) == {
        (x, y, 8) for x in (40, 48, 32) for y in (16, 24, 32)} - {
            (x, y, 8) for x in (32, 48) for y in (16, 24, 32) if max(x - 20, 60 - x) > 24} | {
        (x, y, 16) for x in (32, 48) for y in (16, 32) if max(x - 20, 60 - x) >= 24}


def test_large_boxes_belong_to_coarse_levels():
    assert {stride for _, _, stride in chosen([[2, 2, 120, 60]])} == {16}
    assert {stride for _, _, stride in chosen([[33, 9, 47, 23]])} == {8}


def test_the_smallest_box_wins():
    found = chosen([[20, 12, 60, 36], [34, 20, 46, 28]])
    assert found[40, 24, 8] == 1


def test_no_object_is_background():
    assert chosen([]) == {}


def test_assignment_of_a_batch():
    samples = [objects_of([[33, 9, 47, 23]], [1]),
               objects_of([], []), objects_of([[33, 9, 47, 23], [2, 2, 120, 60]], [0, 1])]
    rows, merged = assign_images(locations(), samples, 2, 1.5)
    assert rows.shape == (6, 160) and len(merged) == 3
    assert [sorted(set(row.tolist())) for row in rows] == [
        [-1], [-1, 0], [-1], [-1], [-1, 1], [-1, 2]]


def test_decode():
    raw = dict(quat=torch.tensor([[2.0, 0, 0, 0]]), proj_ctr=torch.tensor([[4.0, -8]]),
               depth=torch.tensor([[20.0]]), size=torch.tensor([[0.0, 0.5, -0.5]]))
    canonical = torch.tensor([[2.0, 4, 1.5]])
    boxes = decode(raw, torch.tensor([[60.0, 40]]), canonical, CAM2IMG[None], (0.1, 80))
    depth = 20 * 200 / (500 * math.sqrt(2))  # 1 / |(1 / f, 1 / f)| = f / sqrt(2)
    assert float(boxes.depths[0]) == pytest.approx(depth, rel=1e-5)
    torch.testing.assert_close(boxes.centers_2d, torch.tensor([[64.0, 32]]))
    torch.testing.assert_close(boxes.centers, torch.tensor([[0, 0, depth]]))
    torch.testing.assert_close(boxes.sizes[0], torch.tensor(
        [2.0, 4 * (1 + math.tanh(0.5)), 1.5 * (1 - math.tanh(0.5))]))
    torch.testing.assert_close(boxes.rotations, torch.eye(3)[None])  # the central ray


@pytest.mark.parametrize('scale', [0.8, 1.2])
def test_learned_depth_does_not_depend_on_the_image_scale(scale):
    """The same raw number in a resized image: depth in proportion to the focal length."""
    raw = dict(quat=torch.tensor([[1.0, 0, 0, 0]]), proj_ctr=torch.zeros(1, 2),
               depth=torch.tensor([[20.0]]), size=torch.zeros(1, 3))
    resized = torch.diag(torch.tensor([scale, scale, 1])) @ CAM2IMG
    depths = [decode(raw, torch.zeros(1, 2), torch.ones(1, 3), matrix[None], (0.1, 80)).depths
              for matrix in (CAM2IMG, resized)]
    torch.testing.assert_close(depths[1], scale * depths[0])


def make_boxes(count=2):
    torch.manual_seed(1)
    return CameraBoxes(
        torch.rand(count, 2) * 60, 5 + 20 * torch.rand(count), 1 + torch.rand(count, 3),
        geometry.quaternion_to_matrix(torch.randn(count, 4)), CAM2IMG.expand(count, 3, 3))


@pytest.mark.parametrize('name, field', [('quat', 'rotations'), ('proj_ctr', 'centers_2d'),
                                         ('depth', 'depths'), ('size', 'sizes')])
def test_a_wrong_quantity_shows_in_its_own_term(name, field):
    target = make_boxes()
    wrong = getattr(target, field) + (30 if name == 'proj_ctr' else 0.3)  # pixels
    losses = disentangled_losses(replace(target, **{field: wrong}), target)
    for key, value in losses.items():
        assert (value > 1e-3).all() if key == name else not value.any()


def test_depth_term_by_hand():
    """A box on the optical axis one metre too far: |1| - beta / 2 on a third of the corners."""
    target = replace(make_boxes(1), centers_2d=torch.tensor([[64.0, 32]]))
    losses = disentangled_losses(replace(target, depths=target.depths + 1), target)
    assert float(losses['depth']) == pytest.approx((1 - 0.025) / 3, rel=1e-4)


def test_centerness_and_giou():
    sides = torch.tensor([[2.0, 3, 8, 3], [4, 4, 4, 4]])
    assert centerness(sides).tolist() == pytest.approx([0.5, 1.0])
    assert giou_loss(sides, sides).tolist() == pytest.approx([0, 0], abs=1e-6)
    # 8 x 8 inside 16 x 8: union and hull are 128
    other = torch.tensor([[4.0, 4, 12, 4]])
    assert float(giou_loss(sides[1:], other)) == pytest.approx(1 - 65 / 129, rel=1e-5)


def losses_of(head, samples, num_cams=2):
    features = [torch.randn(len(samples), num_cams, 8, *size) for size in SIZES]
    return head.loss(features, [SimpleNamespace(gt_mono=s) for s in samples],
                     CAM2IMG.expand(len(samples), num_cams, 3, 3))


@pytest.mark.parametrize('samples', [
    [objects_of([[33, 9, 47, 23]], [1]), objects_of([[2, 2, 120, 60], [33, 9, 47, 23]], [0, 1])],
    [objects_of([], []), objects_of([], [])],
    [objects_of([[33, 9, 47, 23]], [1], attrs=torch.tensor([3]), speeds=torch.tensor([torch.nan])),
     objects_of([], [])]], ids=['objects', 'none', 'no attribute, no speed'])
def test_every_parameter_gets_a_gradient(samples):
    head = make_head().train()
    losses = losses_of(head, samples)
    assert all(value.isfinite() for value in losses.values()) and losses['loss_cls'] > 0
    assert len(losses) == 10
    if not any(len(sample) for sample in samples):
        assert all(value == 0 for name, value in losses.items() if name != 'loss_cls')
    if samples[0].attrs.eq(3).all():
        assert losses['loss_attr'] == losses['loss_speed'] == 0
    sum(losses.values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


def perfect_outputs(head, sample, cam2img):
    """Raw outputs (1, P, c) that say exactly what `sample` holds, at every pixel for object 0."""
    place = locations()
    rays = geometry.unproject(sample.centers_2d, torch.ones(1), cam2img[None])
    local = geometry.ray_rotation(rays).mT @ sample.rots
    quat = rotation_to_quaternion(local[0])
    size = torch.atanh(sample.sizes_wlh / head.canonical_sizes[sample.labels] - 1)
    depth = sample.depths * 500 * (1 / cam2img[[0, 1], [0, 1]]).norm()
    count, classes = len(place.points), head.num_classes
    repeat = lambda row: row.reshape(1, 1, -1, 1).expand(1, count, -1, classes).flatten(2)
    raw = {name: torch.zeros(1, count, head.predictors[name].out_channels)
           for name in head.predictors}
    raw.update(quat=repeat(quat), size=repeat(size), depth=repeat(depth))
    raw['proj_ctr'] = (sample.centers_2d - place.points)[None, :, :, None].expand(
        -1, -1, -1, classes).flatten(2)
    sides = torch.cat([place.points - sample.bboxes[0, :2], sample.bboxes[0, 2:] - place.points],
                      -1)
    raw['box2d'] = sides[None].clamp(min=0.5)
    raw['cls'] = torch.full((1, count, classes), -12.0)
    return raw


def rotation_to_quaternion(matrix):
    w = (1 + matrix.trace()).clamp(min=1e-6).sqrt() / 2
    return torch.stack([w, (matrix[2, 1] - matrix[1, 2]) / (4 * w),
                        (matrix[0, 2] - matrix[2, 0]) / (4 * w),
                        (matrix[1, 0] - matrix[0, 1]) / (4 * w)])


def test_perfect_outputs_cost_nothing_and_are_decoded():
    head = make_head().eval()
    sample = objects_of([[33, 9, 47, 23]], [0], labels=torch.tensor([3]))
    sample.sizes_wlh = sample.sizes_wlh * torch.tensor([[1.1, 0.8, 1.3]])
    raw = perfect_outputs(head, sample, CAM2IMG)
    rows, merged = assign_images(locations(), [sample], 1, 1.5)
    index = torch.nonzero(rows[0] >= 0)[:, 0]
    labels = torch.full_like(rows, head.num_classes)
    labels[0, index] = merged.labels[rows[0, index]]
    losses = head._losses(raw, {name: out[0, index] for name, out in raw.items()}, labels,
                          locations().points[index], CAM2IMG.expand(len(index), 3, 3),
                          merged[rows[0, index]])
    for name in (*BOX3D, ):
        assert float(losses[f'loss_box3d_{name}']) < 1e-6
    assert float(losses['loss_box2d_reg']) < 1e-6

    raw['cls'][0, index[0], 3] = 8.0
    candidates, = head._candidates(raw, [128, 32])
    boxes, scores, labels = head._predict_image({name: out[0] for name, out in raw.items()},
                                                locations().points, candidates, CAM2IMG)
    assert labels.tolist() == [3] and 0.2 < float(scores) < 1
    expected = CameraBoxes(sample.centers_2d, sample.depths, sample.sizes_wlh, sample.rots,
                           CAM2IMG[None])
    torch.testing.assert_close(boxes.corners, expected.corners, atol=1e-3, rtol=0)


def test_predict_merges_cameras():
    head = make_head(test_cfg=dict(score_thr=0.001, max_per_sample=6)).eval()
    features = [torch.randn(2, 3, 8, *size) * 3 for size in SIZES]
    results = head.predict(features, CAM2IMG.expand(2, 3, 3, 3), torch.eye(4).expand(2, 3, 4, 4))
    assert len(results) == 2
    for result in results:
        assert 0 < len(result) <= 6 and result.bboxes_3d.tensor.shape[1] == 7
        assert (result.scores_3d.diff() <= 0).all()


def test_predict_without_any_candidate():
    head = make_head().eval()
    torch.nn.init.constant_(head.predictors['cls'].bias, -30.0)
    features = [torch.randn(1, 2, 8, *size) for size in SIZES]
    results = head.predict(features, CAM2IMG.expand(1, 2, 3, 3), torch.eye(4).expand(1, 2, 4, 4))
    assert len(results[0].scores_3d) == 0


def test_levels_have_norms_of_their_own():
    head = make_head().train()
    x = torch.randn(2, 8, 4, 5)
    for tower in head.towers.values():
        tower(x * 5 + 3, 1)
        assert tower.norms[0][1].running_mean.any() and not tower.norms[0][0].running_mean.any()


def test_refuses():
    with pytest.raises(ValueError, match=r'classes must be num_classes .4. names'):
        make_head(num_classes=4)
    with pytest.raises(ValueError, match='2 levels'):
        make_head()([torch.randn(1, 8, 4, 4)])
