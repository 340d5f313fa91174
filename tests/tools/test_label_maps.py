# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Label maps that do not fit the loss: found in the sample, by every trainer with the hook."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from mmengine.dataset import Compose
from torch import nn

from mmdcnv4.checks.samples import check_samples_of, label_range
from mmdcnv4.engine.hooks.run_checks import RunChecksHook
from mmdcnv4.errors import InvalidValue
from mmdcnv4.models.losses import WeightedCrossEntropy

losses = pytest.importorskip('mmseg.models.losses')
EQUAL, WEIGHTED = losses.CrossEntropyLoss(), losses.CrossEntropyLoss(class_weight=[1.0] * 3)
OURS = WeightedCrossEntropy([1.0] * 3)


class Segmentor(nn.Module):
    def __init__(self, loss, size=None, divisor=None, pad=255):
        super().__init__()
        self.head = nn.Module()
        self.head.loss_decode, self.head.num_classes, self.head.ignore_index = loss, 3, 255
        self.data_preprocessor = SimpleNamespace(size=size, size_divisor=divisor, seg_pad_val=pad)


def sample(labels):
    return dict(data_samples=SimpleNamespace(gt_sem_seg=SimpleNamespace(data=labels)),
                img_path='a.jpg', seg_map_path='a.png')


def run(model, labels):
    """One sample through the hook, as any Runner calls it."""
    dataset = SimpleNamespace(pipeline=Compose([lambda data: data]))
    loop = SimpleNamespace(dataloader=SimpleNamespace(dataset=dataset))
    RunChecksHook(check_config=False).before_run(SimpleNamespace(
        model=model, cfg={}, _train_loop=loop))
    return dataset.pipeline(sample(labels))


@pytest.mark.parametrize('loss', [EQUAL, WEIGHTED, OURS])
def test_labels_outside_the_classes(loss):
    labels = torch.tensor([[[0, 1], [2, 2]]])
    assert run(Segmentor(loss), labels)
    with pytest.raises(InvalidValue, match='a.png holds the value 3, allowed are 0 ... 2 and 255'):
        run(Segmentor(loss), labels + 3)
    with pytest.raises(InvalidValue, match='must have one channel'):
        run(Segmentor(loss), labels.expand(3, 2, 2))


@pytest.mark.parametrize('model, labels, fails', [
    (Segmentor(WEIGHTED), [0, 255], True), (Segmentor(WEIGHTED), [0, 1], False),
    (Segmentor(WEIGHTED, size=(2, 2)), [0, 1], True),
    (Segmentor(WEIGHTED, size=(1, 2)), [0, 1], False),
    (Segmentor(WEIGHTED, divisor=4), [0, 1], True),
    (Segmentor(WEIGHTED, size=(2, 2), pad=0), [0, 1], False),
    (Segmentor(EQUAL, size=(2, 2)), [0, 255], False),
    (Segmentor(OURS, size=(2, 2)), [0, 255], False)])
def test_ignored_pixels_and_weights_of_classes(model, labels, fails):
    """The refusal is right: the loss of mmsegmentation does fail on such a map."""
    labels = torch.tensor([[labels]])
    if not fails:
        assert run(model, labels)
        return
    with pytest.raises(InvalidValue, match="a.png has ignored pixels .*'WeightedCrossEntropy'"):
        run(model, labels)
    with pytest.raises(IndexError):
        WEIGHTED(torch.zeros(1, 3, 1, 2), torch.tensor([[[0, 255]]]), ignore_index=255)


def test_other_losses_take_all_labels():
    assert label_range(Segmentor(losses.DiceLoss())) is None
    check_samples_of(SimpleNamespace(pipeline=None))
