# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The published training settings of InternImage, written down once more.

Source: "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable Convolutions",
arXiv:2211.05778, and the configuration files that were published with it.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional

import pytest
from mmengine.optim import DefaultOptimWrapperConstructor

from helpers.zoo import ZOO, build_model, build_optimiser, leaf, read

K1, K22, JOINT = '1k_224', '22k_192to384', 'jointto22k_384'
DEPTHS = dict(t=(4, 4, 18, 4), s=(4, 4, 21, 4), b=(4, 4, 21, 4), l=(5, 5, 22, 5), xl=(5, 5, 24, 5))


class Recipe(NamedTuple):
    """One published file; no rate is the default constructor."""

    method: str
    size: str
    rest: str  # of the file name
    length: int  # epochs or iterations
    batch: int
    lr: float
    drop_path: float
    rate: Optional[float] = 1.0
    weight_decay: float = 0.05
    clip: Optional[float] = None
    weights: Optional[str] = K1
    with_cp: bool = False
    averages: bool = False

    @property
    def start(self):
        return f'{self.method}_intern-image-{self.size}_{self.rest}'


RECIPES = [
    *(Recipe('mask-rcnn', size, f'fpn_8xb2-{schedule}', 12 * int(schedule[0]), 16, 1e-4, drop)
      for size, drop in (('t', 0.2), ('s', 0.3), ('b', 0.4)) for schedule in ('1x', '3x')),
    *(Recipe('cascade-mask-rcnn', size, 'fpn_8xb2-1x', 12, 16, 1e-4, 0.4, 0.94, weights=K22)
      for size in ('l', 'xl')),
    *(Recipe('cascade-mask-rcnn', size, 'fpn_32xb2-3x', 36, 64, 2e-4, drop, 0.9, weights=K22,
             averages=True) for size, drop in (('l', 0.4), ('xl', 0.6))),
    Recipe('dino-4scale', 't', '8xb2', 12, 16, 1e-4, 0.2, 0.9, 1e-4, 0.1, with_cp=True),
    Recipe('dino-4scale', 'l', '8xb2', 12, 16, 1e-4, 0.4, None, 0.05, 0.1, K22),
    *(Recipe('upernet', size, '8xb2', 160000, 16, 6e-5, drop)
      for size, drop in (('t', 0.2), ('s', 0.3), ('b', 0.4))),
    *(Recipe('upernet', size, '8xb2', 160000, 16, 2e-5, 0.4, 0.94, clip=0.1, weights=K22)
      for size in ('l', 'xl')),
    Recipe('upernet', 'h', '16xb1', 160000, 16, 2e-5, 0.5, 0.95, clip=0.1, weights=JOINT),
    *(Recipe('image-classifier', size, '8xb128-300e', 300, 1024, 1e-3, drop, None, clip=5.0,
             weights=None, averages=True) for size, drop in (('t', 0.1), ('s', 0.4), ('b', 0.5))),
    Recipe('image-classifier', 'l', '16xb32-20e', 20, 512, 2e-5, 0.1, 0.9, clip=5.0, weights=None,
           averages=True),
    Recipe('image-classifier', 'xl', '16xb32-20e', 20, 512, 2e-5, 0.2, 1.0, clip=5.0, weights=None,
           averages=True),
]


def test_every_recipe_is_compared():
    own = sorted(Path(name).name for name in ZOO if name.startswith('intern_image/'))
    assert sorted(Path(leaf(recipe.start)).name for recipe in RECIPES) == own


@pytest.mark.parametrize('recipe', RECIPES, ids=lambda recipe: recipe.start)
def test_settings(recipe):
    cfg = read(leaf(recipe.start))
    assert (cfg.train_cfg.get('max_epochs') or cfg.train_cfg.max_iters) == recipe.length
    assert cfg.auto_scale_lr.base_batch_size == recipe.batch
    optim, backbone = cfg.optim_wrapper, cfg.model.backbone
    assert (optim.optimizer.type, optim.optimizer.lr, optim.optimizer.weight_decay) == (
        'AdamW', pytest.approx(recipe.lr), recipe.weight_decay)
    clip = optim.get('clip_grad')
    assert (clip and clip.max_norm) == recipe.clip
    if recipe.rate is None:
        assert optim.get('constructor', 'DefaultOptimWrapperConstructor') == (
            DefaultOptimWrapperConstructor.__name__)
    else:
        assert optim.paramwise_cfg.layer_decay_rate == recipe.rate
    assert (backbone.type, backbone.arch, backbone.drop_path_rate, backbone.get('with_cp', False)
            ) == ('InternImage', recipe.size, recipe.drop_path, recipe.with_cp)
    is_classifier = recipe.method == 'image-classifier'
    has_none = is_classifier or recipe.size == 'h'
    assert backbone.get('layer_scale') == (None if has_none else 1.0)
    assert (backbone.get('init_cfg') or {}).get('checkpoint') == (
        recipe.weights and f'checkpoints/internimage_{recipe.size}_{recipe.weights}.pth')
    if is_classifier and recipe.length == 20:
        assert cfg.load_from == f'checkpoints/intern-image-{recipe.size}_22kto1k-rows.pth'
    hooks = [hook for hook in cfg.get('custom_hooks') or [] if hook.type == 'EMAHook']
    assert [hook.momentum for hook in hooks] == [1e-4] * recipe.averages
    assert all(hook.update_buffers for hook in hooks)
    if recipe.method.endswith('rcnn'):
        assert cfg.model.neck.get('norm_cfg') is None  # FlashInternImage: ChannelLN
    if recipe.method == 'upernet':
        assert [step.type for step in cfg.test_dataloader.dataset.pipeline][1:3] == [
            'Resize', 'ResizeToMultiple']


def test_learning_rates_of_the_fine_tuning():
    """L: decay from the last block, and a tenth for the offsets of DCNv3; XL: one rate."""
    for size in ('l', 'xl'):
        cfg = read(leaf(f'image-classifier_intern-image-{size}'))
        model = build_model(cfg, 'meta')
        groups = {id(p): (group['lr'], group['weight_decay'])
                  for group in build_optimiser(cfg, model).optimizer.param_groups
                  for p in group['params']}
        found = {name: groups[id(p)] for name, p in model.named_parameters()}
        last = sum(DEPTHS[size][:3])
        for name, (lr, decay) in found.items():
            assert decay == (0.0 if model.get_parameter(name).dim() == 1 else 0.05), name
            if size == 'xl':
                assert lr == pytest.approx(2e-5), name
        if size == 'l':
            stem = found['backbone.patch_embed.conv1.weight'][0]
            first = found['backbone.levels.0.blocks.0.mlp.fc1.weight'][0]
            assert stem == pytest.approx(first) == pytest.approx(
                2e-5 * 0.9**(last + DEPTHS[size][3] - 1))
            end = f'backbone.levels.3.blocks.{DEPTHS[size][3] - 1}.'
            assert found[end + 'mlp.fc1.weight'][0] == pytest.approx(2e-5)
            assert found[end + 'dcn.offset.weight'][0] == pytest.approx(2e-6)
            assert found[end + 'dcn.mask.weight'][0] == pytest.approx(2e-5)
            assert found['head.fc.weight'][0] == pytest.approx(2e-5)
