# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Box codes, assignment, groups of queries, losses and predictions of the BEV head."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.structures import InstanceData

from mmdcnv4.bevformer_v2.models.bev_head import BEVFormerV2Head
from mmdcnv4.bevformer_v2.models.box_code import (
    BBox3DCodeSmoothL1Cost,
    decode_boxes,
    encode_boxes,
    select_boxes,
)

RANGE = (-20.0, -10.0, -3.0, 20.0, 10.0, 3.0)
BOXES = torch.tensor([[4.0, -3, 0.5, 4.5, 1.9, 1.6, 0.8, 1, -2],
                      [-12, 6, -1, 0.7, 0.8, 1.7, -3, 0, 0]])


def make_head(**changes):
    torch.manual_seed(0)
    options = dict(num_classes=3, pc_range=RANGE, bev_size=(4, 8), embed_dims=16, num_layers=2,
                   num_queries=7, num_groups=3,
                   layer_cfg=dict(num_heads=2, feedforward_channels=20, dropout=0.0))
    return BEVFormerV2Head(**{**options, **changes})


def sample_of(boxes, labels):
    return SimpleNamespace(gt_instances_3d=InstanceData(
        bboxes_3d=LiDARInstance3DBoxes(boxes, box_dim=9, origin=(0.5, 0.5, 0.5)),
        labels_3d=torch.tensor(labels, dtype=torch.long)))


EMPTY = sample_of(torch.zeros(0, 9), [])


def targets_of(head, codes, objects):
    """Labels, codes and weights for one group of queries of one sample."""
    head.eval()  # one group
    assigned = head._assign(torch.zeros(1, 1, len(codes), 3), codes[None, None], [objects])
    return head._targets(assigned.flatten(), [objects])


def losses_of_layer(head, logits, codes, objects):
    assigned, = head._assign(logits[None], codes[None], objects)
    return head._layer_loss(logits, codes, assigned, objects)


def test_code_of_a_box():
    code = encode_boxes(BOXES[:1])[0].tolist()
    expected = [4, -3, math.log(4.5), math.log(1.9), 0.5, math.log(1.6), math.sin(0.8),
                math.cos(0.8), 1, -2]
    assert code == pytest.approx(expected)


@pytest.mark.parametrize('turns', [0, 1, -2])
def test_decode_inverts_encode(turns):
    boxes = BOXES.clone()
    boxes[:, 6] += 2 * math.pi * turns
    torch.testing.assert_close(decode_boxes(encode_boxes(boxes)), BOXES, atol=1e-5, rtol=1e-5)


def test_select_boxes():
    logits = torch.tensor([[0.0, 3.0], [2.0, -9.0], [5.0, 4.0]])
    codes = encode_boxes(BOXES[[0, 1, 0]])
    codes[2, 0] = 100  # outside
    boxes, scores, labels = select_boxes(logits, codes, 4, (-61, -61, -10, 61, 61, 10))
    assert labels.tolist() == [1, 0]
    torch.testing.assert_close(scores, torch.tensor([3.0, 2.0]).sigmoid())
    torch.testing.assert_close(boxes, BOXES)


def test_cost():
    codes = torch.zeros(2, 10)
    codes[1, 0], codes[1, 3], codes[1, 9] = 3, 0.5, 100  # the velocity does not count
    cost = BBox3DCodeSmoothL1Cost(weight=0.75)(
        InstanceData(bboxes=codes), InstanceData(bboxes=torch.zeros(1, 10)))
    torch.testing.assert_close(cost, torch.tensor([[0.0], [0.75 * (2.5 + 0.125)]]))
    with pytest.raises(ValueError, match='dims must be 1 ... 10, got 11'):
        BBox3DCodeSmoothL1Cost(dims=11)


def test_assignment_is_that_of_least_cost():
    head = make_head()
    objects = head._objects(sample_of(BOXES, [2, 0]).gt_instances_3d, torch.device('cpu'))
    codes = torch.zeros(7, 10)
    codes[4], codes[1] = objects.bboxes[0], objects.bboxes[1]
    codes[4, 8:] = 50
    labels, targets, weights = targets_of(head, codes, objects)
    assert labels.tolist() == [3, 0, 3, 3, 2, 3, 3]
    torch.testing.assert_close(targets[4], objects.bboxes[0])
    assert weights[1].tolist() == pytest.approx([1] * 8 + [0.2] * 2)
    assert not weights[[0, 2, 3, 5, 6]].any()


def test_assignment_is_that_of_mmdet():
    """All layers, samples and groups at once, against mmdet's assigner on one after another."""
    head = make_head().train()
    samples = [sample_of(BOXES, [2, 0]), EMPTY, sample_of(BOXES[[1, 0, 0]] + 1, [1, 1, 2])]
    objects = [head._objects(sample.gt_instances_3d, torch.device('cpu')) for sample in samples]
    logits, codes = torch.randn(2, 3, 21, 3), torch.randn(2, 3, 21, 10)
    codes[0, 0, 3] = torch.nan
    assigned = head._assign(logits, codes, objects)
    first = (0, 2, 2)
    for layer, sample, group in np.ndindex(2, 3, 3):
        rows = slice(7 * group, 7 * group + 7)
        expected = head.assigner.assign(InstanceData(
            scores=logits[layer, sample, rows],
            bboxes=codes[layer, sample, rows].nan_to_num()), objects[sample]).gt_inds
        expected = torch.where(expected > 0, expected - 1 + first[sample], -1)
        assert torch.equal(assigned[layer, sample, rows], expected)
    assert (assigned >= 0).sum() == 2 * 3 * 5


def test_unknown_velocity_has_no_weight():
    head = make_head()
    boxes = BOXES[:1].clone()
    boxes[0, 7:] = torch.nan
    objects = head._objects(sample_of(boxes, [1]).gt_instances_3d, torch.device('cpu'))
    _, targets, weights = targets_of(head, torch.zeros(7, 10), objects)
    row = weights.sum(-1).argmax()
    assert weights[row].tolist() == [1] * 8 + [0, 0] and targets.isfinite().all()


def test_perfect_boxes_cost_nothing():
    head = make_head()
    objects = head._objects(sample_of(BOXES, [2, 0]).gt_instances_3d, torch.device('cpu'))
    codes = torch.zeros(1, 21, 10)
    for group in range(3):
        codes[0, 7 * group:7 * group + 2] = objects.bboxes
    loss_cls, loss_bbox = losses_of_layer(head, torch.full((1, 21, 3), -20.0), codes,
                                          [objects])
    assert loss_bbox == 0 and loss_cls > 1


def test_losses_by_hand():
    """One object, one group, two samples of which one is empty: 2 * focal and 0.75 * L1."""
    head = make_head(num_groups=1, num_queries=2)
    objects = [head._objects(sample.gt_instances_3d, torch.device('cpu'))
               for sample in (sample_of(BOXES[:1], [1]), EMPTY)]
    codes = torch.zeros(2, 2, 10)
    codes[0, 0] = objects[0].bboxes[0]
    codes[0, 0, 0] += 3  # smooth-L1: 2.5
    codes[0, 0, 8] += 2  # 1.5, weight 0.2
    logits = torch.zeros(2, 2, 3)
    loss_cls, loss_bbox = losses_of_layer(head, logits, codes, objects)
    # twelve probabilities of 1/2, one of them for a true class
    focal = 0.25 * math.log(2) * (0.25 + 11 * 0.75)
    assert float(loss_cls) == pytest.approx(2 * focal, rel=1e-5)
    assert float(loss_bbox) == pytest.approx(0.75 * (2.5 + 0.3), rel=1e-5)


def test_groups_do_not_see_each_other():
    head = make_head().train()
    bev = torch.randn(2, 32, 16)
    logits, codes = head(bev)
    assert logits.shape == (2, 2, 21, 3) and codes.shape == (2, 2, 21, 10)
    with torch.no_grad():
        head.query_embedding.weight[7:14] += 1
    changed, _ = head(bev)
    torch.testing.assert_close(changed[:, :, :7], logits[:, :, :7])
    torch.testing.assert_close(changed[:, :, 14:], logits[:, :, 14:])
    assert not torch.allclose(changed[:, :, 7:14], logits[:, :, 7:14])


def test_equal_groups_give_equal_results():
    head = make_head().train()
    with torch.no_grad():
        head.query_embedding.weight.copy_(head.query_embedding.weight[:7].repeat(3, 1))
    bev = torch.randn(2, 32, 16)
    logits, codes = head(bev)
    torch.testing.assert_close(logits[:, :, :7], logits[:, :, 14:])
    torch.testing.assert_close(codes[:, :, :7], codes[:, :, 7:14])
    logits_eval, codes_eval = head.eval()(bev)  # the first group alone
    torch.testing.assert_close(logits_eval, logits[:, :, :7])
    torch.testing.assert_close(codes_eval, codes[:, :, :7])


def test_group_losses_are_averaged():
    one, three = make_head(num_groups=1).train(), make_head().train()
    state = one.state_dict()
    state['query_embedding.weight'] = state['query_embedding.weight'].repeat(3, 1)
    three.load_state_dict(state)
    bev, samples = torch.randn(2, 32, 16), [sample_of(BOXES, [2, 0]), sample_of(BOXES[:1], [1])]
    expected, losses = one.loss(bev, samples), three.loss(bev, samples)
    assert set(losses) == {'loss_cls', 'loss_bbox', 'd0.loss_cls', 'd0.loss_bbox'}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value)


def test_centres_stay_inside_the_range():
    head = make_head().eval()
    _, codes = head(torch.randn(1, 32, 16) * 50)
    assert (codes[..., 0].abs() <= 20).all() and (codes[..., 1].abs() <= 10).all()
    assert (codes[..., 4].abs() <= 3).all()


def test_references_are_refined():
    """A layer's centre is its raw number beside that of the layer before it."""
    head = make_head().eval()
    for branch in head.reg_branches:
        torch.nn.init.zeros_(branch[-1].weight)
        with torch.no_grad():
            branch[-1].bias.copy_(torch.tensor([0.5, 0, 0, 0, 0.25, 0, 0, 0, 0, 0]))
    _, codes = head(torch.randn(1, 32, 16))
    raw = torch.logit((codes[..., [0, 4]] - torch.tensor([-20.0, -3])) / torch.tensor([40.0, 6]))
    torch.testing.assert_close(raw[1] - raw[0], torch.tensor([0.5, 0.25]).expand(1, 7, 2),
                               atol=1e-3, rtol=0)


def test_no_object_leaves_no_parameter_without_gradient():
    head = make_head().train()
    losses = head.loss(torch.randn(2, 32, 16), [EMPTY, EMPTY])
    assert losses['loss_bbox'] == 0 and losses['loss_cls'] > 0
    sum(losses.values()).backward()
    assert [name for name, p in head.named_parameters() if p.grad is None] == []


def test_range():
    with pytest.raises(ValueError, match=r'BEVFormerV2Head: pc_range must be .* got \(1, 2, 3\)'):
        make_head(pc_range=[1, 2, 3])


def test_foreign_label():
    with pytest.raises(ValueError, match=r'labels must be 0 ... 2 \(num_classes\), got 0 ... 3'):
        make_head().loss(torch.randn(1, 32, 16), [sample_of(BOXES, [3, 0])])


def test_predict():
    head = make_head(test_cfg=dict(max_per_sample=5)).eval()
    results = head.predict(torch.randn(2, 32, 16))
    assert len(results) == 2
    for result in results:
        assert result.bboxes_3d.tensor.shape == (5, 9) and len(result.labels_3d) == 5
        assert (result.scores_3d.diff() <= 0).all()
    _, codes = head(torch.randn(2, 32, 16))
    assert codes.shape[2] == 7


def test_self_attention_is_that_of_mmcv():
    """Without its averaged Q x Q weights."""
    layer = make_head().layers[0]
    for training in (True, False):  # no dropout in this head
        layer.train(training)
        query, pos = torch.randn(2, 3, 7, 16)
        torch.testing.assert_close(layer._attend(query, pos),
                                   layer.self_attn(query, query_pos=pos))


def test_recomputed_layers_have_the_same_gradients():
    grads = []
    for with_cp in (False, True):
        head = make_head(layer_cfg=dict(num_heads=2, dropout=0.3, with_cp=with_cp))
        bev = torch.randn(2, 32, 16, generator=torch.Generator().manual_seed(3))
        torch.manual_seed(1)  # of the dropout
        sum(head.loss(bev, [sample_of(BOXES, [0, 2]), EMPTY]).values()).backward()
        grads.append({name: p.grad for name, p in head.named_parameters()})
    assert all(grad is not None for grad in grads[1].values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_refinement_starts_with_small_steps():
    """A layer of a new head moves a reference by a small part of the range."""
    head = make_head(num_layers=6, embed_dims=64, num_queries=50).eval()
    _, codes = head(torch.randn(1, 32, 64))
    steps = (codes[1:, ..., 0] - codes[:-1, ..., 0]).abs().mean()
    assert 0 < steps < 0.05 * (RANGE[3] - RANGE[0])
