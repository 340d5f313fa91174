# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The weighted cross entropy on pixels without a label."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip('mmengine', reason='mmengine is not installed')

from mmdcnv4.models.losses import WeightedCrossEntropy

WEIGHTS = [0.1, 0.4, 2.0, 0.0]


def by_hand(logits, labels, ignored=255):
    """The definition, pixel by pixel."""
    above, below = 0.0, 0.0
    for row, label in zip(logits.movedim(1, -1).reshape(-1, len(WEIGHTS)), labels.flatten()):
        if label != ignored:
            above += WEIGHTS[label] * (row.exp().sum().log() - row[label])
            below += WEIGHTS[label]
    return above / below


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 4, 3, 5, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(0, 4, (2, 3, 5), generator=generator)


@pytest.mark.parametrize('ignored', [255, -1])
def test_ignored_pixels_do_not_count(ignored):
    logits, labels = batch()
    labels[0, :2] = ignored
    loss = WeightedCrossEntropy(WEIGHTS, loss_weight=0.5)(logits, labels, ignore_index=ignored)
    torch.testing.assert_close(loss, 0.5 * by_hand(logits, labels, ignored))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient.movedim(1, -1)[labels == ignored].any()
    assert gradient.movedim(1, -1)[(labels != ignored) & (labels != 3)].ne(0).all()


def test_without_a_labelled_pixel_it_is_zero():
    logits, labels = batch()
    for label in (255, 3):  # 3 has the weight zero
        loss = WeightedCrossEntropy(WEIGHTS)(logits, torch.full_like(labels, label))
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0 and not gradient.any()


def test_a_half_type_does_not_overflow():
    """The sum of the weights of 90,000 pixels is beyond float16."""
    logits = torch.zeros(1, 2, 300, 300, dtype=torch.float16)
    labels = torch.ones(1, 300, 300, dtype=torch.int64)
    loss = WeightedCrossEntropy([1.0, 1.0])(logits, labels)
    assert loss.item() == pytest.approx(0.693147, abs=1e-5)


def test_it_is_the_loss_of_mmsegmentation():
    losses = pytest.importorskip('mmseg.models.losses')
    logits, labels = batch(1)
    host = losses.CrossEntropyLoss(class_weight=WEIGHTS, loss_weight=0.4)
    ours = WeightedCrossEntropy(WEIGHTS, loss_weight=0.4)
    assert host.loss_name == ours.loss_name and list(ours.state_dict()) == []
    weight = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2))
    for pixels in (None, weight):
        torch.testing.assert_close(ours(logits, labels, pixels), host(logits, labels, pixels))
    labels[0, 0, 0] = 255
    with pytest.raises(IndexError):  # when this passes, the class has served its time
        host(logits, labels, ignore_index=255)


@pytest.mark.parametrize('weights', [[1, -1], [float('nan')], [[1.0, 2.0]], 3.0])
def test_bad_weights(weights):
    with pytest.raises(ValueError, match='class_weight must be numbers >= 0, one per class'):
        WeightedCrossEntropy(weights)


def test_other_number_of_classes():
    with pytest.raises(ValueError, match='must have 4 values, one per class, got 2'):
        WeightedCrossEntropy([1.0, 1.0])(*batch())
