# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Queries from proposals: places, ranks, start, groups, gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmdet3d.structures import LiDARInstance3DBoxes
from mmengine.structures import InstanceData

from mmdcnv4.bevformer_v2 import geometry
from mmdcnv4.bevformer_v2.models.bev_head import BEVFormerV2Head
from mmdcnv4.bevformer_v2.models.two_stage import ProposalQueries, sine_code

RANGE = (-20.0, -10.0, -3.0, 20.0, 10.0, 3.0)
DTYPE = dict(type='TwoStageBEVFormerV2', proposals=dict(
    type='ProposalQueries', pc_range=(-25.6, -25.6, -5.0, 25.6, 25.6, 3.0), num_proposals=9,
    embed_dims=64, start_iteration=0))


def proposals_of(*samples):
    return [InstanceData(bboxes_3d=LiDARInstance3DBoxes(
        torch.tensor(rows).reshape(-1, 7).float(), origin=(0.5, 0.5, 0.5))) for rows in samples]


def box(x, y, z):
    return [x, y, z, 4, 2, 1.5, 0.3]


def make_queries(**changes):
    torch.manual_seed(0)
    options = dict(pc_range=RANGE, num_proposals=3, embed_dims=16, start_iteration=0)
    return ProposalQueries(**{**options, **changes})


def test_references():
    queries = make_queries().eval()(proposals_of(
        [box(10, -5, 0), box(-20, 0, 1.5)], [], [box(0, 0, 0)] * 5))
    assert queries.is_valid.tolist() == [[True, True, False], [False] * 3, [True] * 3]
    torch.testing.assert_close(queries.reference[0, :2], torch.tensor(
        [[0.75, 0.25, 0.5], [0.01, 0.5, 0.75]]))


def test_proposals_move_with_the_plane():
    matrix = torch.from_numpy(geometry.bda_matrix(np.pi / 2, 1.0, True, False))[None]
    queries = make_queries().eval()(proposals_of([box(4, 8, 0)]), matrix)
    # a quarter turn: (-8, 4); x changes sign: (8, 4)
    torch.testing.assert_close(queries.reference[0, 0], torch.tensor([0.7, 0.7, 0.5]))


def test_proposals_wait_in_training_only():
    module = make_queries(start_iteration=2).train()
    sample = proposals_of([box(4, 8, 0)])
    assert [bool(module(sample).is_valid.any()) for _ in range(4)] == [False, False, True, True]
    assert 'iteration' in module.state_dict()
    assert make_queries(start_iteration=2).eval()(sample).is_valid.any()


def test_the_place_enters_the_position():
    module = make_queries().eval()
    first, second = (module(proposals_of([box(x, 1, 0)])) for x in (3, 9))
    torch.testing.assert_close(first.pos, second.pos)  # at the start without effect
    torch.nn.init.ones_(module.position[2].weight)
    first, second = (module(proposals_of([box(x, 1, 0)])) for x in (3, 9))
    assert not torch.allclose(first.pos[0, 0], second.pos[0, 0])
    torch.testing.assert_close(first.pos[0, 1:], second.pos[0, 1:])  # unused


def test_sine_code():
    code = sine_code(torch.tensor([[0.25, 0.0]]), 8)
    assert code.shape == (1, 8)
    assert code[0, [0, 2, 4, 6]].tolist() == pytest.approx([1, 0, 0, 1], abs=1e-6)


@pytest.mark.parametrize('training', [True, False])
def test_head_starts_from_the_proposals(training):
    head = BEVFormerV2Head(num_classes=3, pc_range=RANGE, bev_size=(4, 8), embed_dims=16,
                           num_layers=1, num_queries=5, num_groups=2,
                           layer_cfg=dict(num_heads=2, feedforward_channels=20, dropout=0.0))
    head.train(training)
    torch.nn.init.zeros_(head.reg_branches[0][-1].weight)
    torch.nn.init.zeros_(head.reg_branches[0][-1].bias)
    extra = make_queries()(proposals_of([box(10, -5, 0)], [box(-10, 5, 1), box(0, 1, 0)]))
    logits, codes = head(torch.randn(2, 32, 16), extra)
    groups = 2 if training else 1
    assert logits.shape == (1, 2, 8 * groups, 3)
    centers = codes[0].unflatten(1, (groups, 8))[..., [0, 1, 4]]
    for group in range(groups):
        torch.testing.assert_close(centers[0, group, 5], torch.tensor([10.0, -5, 0]), atol=1e-4,
                                   rtol=0)
        torch.testing.assert_close(centers[1, group, 6], torch.tensor([0.0, 1, 0]), atol=1e-4,
                                   rtol=0)
        own = head.reference(extra.pos[0, 2]).sigmoid()
        expected = own * head.range_size + head.range_low
        torch.testing.assert_close(centers[0, group, 7], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize('score_thr', [0.0, 1.0], ids=['proposals', 'no proposals'])
def test_every_parameter_gets_a_gradient(make_model, make_batch, score_thr):
    model = make_model(**DTYPE, perspective_head=dict(test_cfg=dict(
        score_thr=score_thr, nms_pre=20))).train()
    data = model.data_preprocessor(make_batch((1,)), True)
    before = {name: value.clone() for name, value in model.perspective_head.named_buffers()}
    queries = []
    forward = model.proposals.forward
    model.proposals.forward = lambda *args: queries.append(forward(*args)) or queries[-1]
    losses = model(data['inputs'], data['data_samples'], mode='loss')
    sum(losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert bool(queries[0].is_valid.any()) == (score_thr == 0)
    # the norms of the perspective head saw the batch once
    tracked = [(name, value - before[name]) for name, value in
               model.perspective_head.named_buffers() if name.endswith('num_batches_tracked')]
    assert tracked and {int(value) for _, value in tracked} == {1}


def test_predictions(make_model, make_batch):
    model = make_model(**DTYPE).eval()
    result = model.test_step(make_batch((0,)))[0].pred_instances_3d
    assert len(result) == 300


def test_a_range_that_is_none():
    with pytest.raises(ValueError, match='ProposalQueries: pc_range must be three minima'):
        ProposalQueries(pc_range=(0, 0, 0, 1, 1, 0))


def test_needs_the_perspective_head(make_model):
    with pytest.raises(ValueError, match='perspective_head must be given'):
        make_model(**DTYPE, perspective_head=None)
