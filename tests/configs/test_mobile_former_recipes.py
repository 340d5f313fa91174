# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The published training settings of Dynamic Mobile-Former, written down once more.

Source: the paper, and the settings that were published with it where the two disagree (README.md of
the configs).
"""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.zoo import ZOO, leaf, read

WIDTHS = dict(xxs=[20, 36, 88, 120], xs=[30, 54, 132, 180], s=[40, 72, 176, 240])
# start of the file name: learning rate, weight decay, epochs, steps
DETECTION = {
    'retinanet_dynamic-mobile-former-xxs': (1e-4, 1e-4, 12, [8, 11]),
    'retinanet_dynamic-mobile-former-xs': (1e-4, 1e-4, 12, [8, 11]),
    'retinanet_dynamic-mobile-former-s': (1e-4, 1e-4, 12, [8, 11]),
    'mask-rcnn_dynamic-mobile-former-s_fpn_8xb2-1x': (2e-4, 1e-4, 12, [8, 11]),
    # three times 12 epochs with steps at 9 and 11, as epochs of the plain dataset
    'mask-rcnn_dynamic-mobile-former-s_fpn_8xb2-3x': (1e-4, 0.05, 36, [27, 33])}
CLASSIFIERS = tuple(f'image-classifier_dynamic-mobile-former-{size}' for size in WIDTHS)


def test_every_recipe_is_compared():
    own = sorted(Path(name).name for name in ZOO if name.startswith('dynamic_mobile_former/'))
    assert sorted(Path(leaf(start)).name for start in (*DETECTION, *CLASSIFIERS)) == own


@pytest.mark.parametrize('start', DETECTION)
def test_detection(start):
    lr, weight_decay, epochs, steps = DETECTION[start]
    cfg = read(leaf(start))
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', lr, weight_decay)
    assert cfg.optim_wrapper.get('clip_grad') is None
    assert cfg.auto_scale_lr.base_batch_size == 16 and cfg.train_cfg.max_epochs == epochs
    assert cfg.param_scheduler[-1].milestones == steps
    size = start.split('former-')[1].split('_')[0]
    backbone, neck = cfg.model.backbone, cfg.model.neck
    assert (backbone.arch, backbone.drop_path_rate, backbone.frozen_stages) == (size, 0.1, 2)
    assert backbone.norm_cfg.type == 'SyncBN' and not backbone.get('norm_eval', False)
    is_retina = start.startswith('retinanet')
    outputs = tuple(backbone.get('out_indices', (0, 1, 2, 3)))
    assert neck.in_channels == [WIDTHS[size][index] for index in outputs]
    # from stride 8, with two more levels that begin at the last map of the backbone
    first = outputs[neck.get('start_level', 0)]
    assert first == (1 if is_retina else 0) and neck.num_outs == 5
    assert (neck.get('add_extra_convs') or None) == ('on_input' if is_retina else None)
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    if epochs == 12:
        assert steps['Resize'].scale == (1333, 800)
    else:
        assert steps['RandomResize'].scale == [(1333, 640), (1333, 800)]


@pytest.mark.parametrize('start', CLASSIFIERS)
def test_classification(start):
    cfg = read(leaf(start))
    optimizer = cfg.optim_wrapper.optimizer
    assert cfg.train_cfg.max_epochs == 470 and cfg.auto_scale_lr.base_batch_size == 1024
    # 6e-3 for 4096 images, the default of the released program; the paper gives none
    assert optimizer.lr == pytest.approx(6e-3 / 4) and optimizer.weight_decay == 0.05
    backbone = cfg.model.backbone
    assert backbone.arch == start.rsplit('-', 1)[1] and backbone.drop_path_rate == 0.1
    assert cfg.model.head.loss.label_smooth_val == 0.1 and cfg.model.train_cfg is None
    steps = {step.type: step for step in cfg.train_dataloader.dataset.pipeline}
    augment = steps['RandAugment']
    assert (augment.magnitude_level, augment.magnitude_std) == (9, 0.5)
    assert steps['RandomErasing'].erase_prob == 0.25
    assert list(cfg.train_dataloader.batch_sampler.sizes) == [160, 192, 224, 256, 320]
    anneal, average = cfg.custom_hooks
    assert (anneal.start, anneal.end, anneal.epochs) == (30.0, 1.0, 10)
    assert average.momentum == 5e-4 and average.update_buffers
    warm_up, curve = cfg.param_scheduler
    assert warm_up.end == 20 and (curve.begin, curve.end) == (0, 470)
