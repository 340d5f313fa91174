# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""How often a GPU would make the host wait, by a stand-in that needs none."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.host_waits import HostWaits


def prepared(model, batch, training):
    data = model.data_preprocessor(batch, training)
    return data['inputs'], data['data_samples']


@pytest.mark.parametrize('layers, groups, samples', [(2, 2, (0, 1)), (6, 11, (1,))])
def test_training_step(make_model, make_batch, layers, groups, samples):
    """The lists of visible cells, the assignment, the positive pixels: whatever the numbers."""
    model = make_model(bev_head=dict(num_layers=layers, num_groups=groups)).train()
    inputs = prepared(model, make_batch(samples), True)
    with HostWaits() as waits:
        loss, _ = model.parse_losses(model.loss(*inputs))
        loss.backward()
    assert waits.total == 3, str(waits)
    assert sorted(what for what, _ in waits.places) == ['cpu', 'nonzero', 'tolist']


@torch.no_grad()
def test_prediction(make_model, make_batch):
    """The lists of visible cells, and for each sample the boxes in range."""
    model = make_model().eval()
    for samples in ((0,), (0, 1)):
        inputs = prepared(model, make_batch(samples), False)
        with HostWaits() as waits:
            model.predict(*inputs)
        assert waits.total == 1 + len(samples), str(waits)


def test_second_stage(make_model, make_batch):
    """Candidates of all images at once; for each image mmcv's NMS, for each sample the classes.

    The kernels of both NMS wait once more each, which is not seen here.
    """
    model = make_model(type='TwoStageBEVFormerV2', proposals=dict(
        type='ProposalQueries', pc_range=(-25.6, -25.6, -5.0, 25.6, 25.6, 3.0), embed_dims=64,
        start_iteration=0), perspective_head=dict(test_cfg=dict(score_thr=0.0))).train()
    for samples in ((0,), (0, 1)):
        inputs = prepared(model, make_batch(samples), True)
        images = 6 * len(samples)
        with HostWaits() as waits:
            model.loss(*inputs)
        assert waits.total == 3 + 1 + images + len(samples), str(waits)


def test_without_objects(make_model, make_batch):
    """No costs, no assignment."""
    model = make_model(frames=(0,)).train()
    inputs, samples = prepared(model, make_batch((0,), frames=(0,)), True)
    samples[0].gt_instances_3d = samples[0].gt_instances_3d[:0]
    with HostWaits() as waits:
        model.loss(inputs, samples)
    assert waits.total == 2, str(waits)


MASK, X = torch.tensor([True, False, True]), torch.arange(3.0)
ARRAY = np.ones(3)


@pytest.mark.parametrize('call, count', [
    (lambda x, mask: x.sum().item(), 1), (lambda x, mask: bool(mask.any()), 1),
    (lambda x, mask: int(x.max()), 1), (lambda x, mask: x.cpu(), 1),
    (lambda x, mask: x.cpu().numpy(), 1), (lambda x, mask: x.tolist(), 1),
    (lambda x, mask: x[mask], 1), (lambda x, mask: x[[0, 2]], 1),
    (lambda x, mask: x.masked_fill_(mask, 0), 0), (lambda x, mask: x[mask.long()], 0),
    (lambda x, mask: x.__setitem__(mask, 0.0), 0),
    (lambda x, mask: x.__setitem__(mask, x[:2] + 1), 1), (lambda x, mask: x.new_tensor([1.0]), 1),
    (lambda x, mask: torch.tensor([1.0], device=x.device), 1),
    (lambda x, mask: torch.arange(3, device=x.device), 0),
    (lambda x, mask: torch.arange(3).to(x.device), 1),
    (lambda x, mask: torch.from_numpy(ARRAY).to(x.device), 1),
    (lambda x, mask: torch.from_numpy(ARRAY).to(x.device, non_blocking=True), 0),
    (lambda x, mask: x[torch.tensor([0, 1])], 1), (lambda x, mask: x.to(torch.float64), 0),
    (lambda x, mask: torch.linalg.inv(x.diag() + 1), 1),
    (lambda x, mask: torch.linalg.inv_ex(x.diag() + 1), 0),
    (lambda x, mask: torch.tensor([2.0]).item(), 0)])
def test_what_is_counted(call, count):
    x, mask = X.clone(), MASK.clone()
    with HostWaits() as waits:
        call(x, mask)
    assert waits.total == count, str(waits)
