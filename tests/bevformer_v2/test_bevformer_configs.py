# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The recipes: sizes, frames, schedules, layers of the optimiser."""

from __future__ import annotations

import re

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from helpers.bevformer import CONFIGS, TINY
from helpers.tool_runner import load_tool
from mmdcnv4.cli.schedule import apply_accumulation
from mmdcnv4.engine.optimizers.layer_decay import layer_id


def test_warm_up_of_the_readme_is_scaled_with_the_accumulation():
    """The command for fewer GPUs: as many samples per update and in the warm-up as with 16."""
    text = (CONFIGS / 'README.md').read_text()
    name, gpus, options = re.search(
        r'dist_train.sh (\S+\.py) (\d+) \\\n +--scale-warm-up --cfg-options (.+)', text).groups()
    cfg = Config.fromfile(CONFIGS / name.split('/')[-1])
    warm_up = cfg.param_scheduler[0].end * cfg.auto_scale_lr.base_batch_size
    cfg.merge_from_dict({key: int(value) for key, value in
                         (option.split('=') for option in options.split())})
    apply_accumulation(cfg, scale_warm_up=True)
    batch = int(gpus) * cfg.train_dataloader.batch_size
    assert batch * cfg.optim_wrapper.accumulative_counts == cfg.auto_scale_lr.base_batch_size
    assert not cfg.param_scheduler[0].by_epoch
    assert cfg.param_scheduler[0].end * batch == warm_up


# name -> (parameters, frames, groups)
MODELS = {
    'r50_t1-base_16xb1-24e': (56_198_160, (0,), 1),
    'r50_t1-base_16xb1-48e': (56_198_160, (0,), 1),
    'r50_t1_16xb1-24e': (60_806_160, (0,), 11),
    'r50_t1_16xb1-48e': (60_806_160, (0,), 11),
    'r50_t2_16xb1-24e': (75_099_920, (-1, 0), 11),
    'r50_t2_16xb1-48e': (75_099_920, (-1, 0), 11),
    'r50_t8_16xb1-24e': (91_616_016, tuple(range(-7, 1)), 11),
    'flash-intern-image-s_t8_16xb1-24e': (115_967_376, tuple(range(-7, 1)), 11),
    'flash-intern-image-s_offline_16xb1-24e': (104_170_896, (-8, 0, 8), 11),
    'flash-intern-image-b_t8_16xb1-24e': (162_488_936, tuple(range(-7, 1)), 11),
    'flash-intern-image-b_offline_16xb1-24e': (150_692_456, (-8, 0, 8), 11),
    # the backbones of configs/intern_image instead of 94,897,048, and the neck of XL
    'intern-image-b_offline_16xb1-24e': (150_692_456 - 94_897_048 + 94_909_920, (-8, 0, 8), 11),
    'intern-image-xl_offline_32xb1-24e': (
        150_692_456 - 94_897_048 + 328_971_228
        + 256 * (384 + 768 + 1536 - 224 - 448 - 896), (-8, 0, 8), 11),
}
TRAINVAL = {'s': 104_170_896, 'b': 150_692_456}


def read(name):
    return Config.fromfile(CONFIGS / f'bevformer-v2_{name}_nus.py')


def build(cfg):
    from mmdet3d.registry import MODELS as REGISTRY
    with torch.device('meta'):
        return REGISTRY.build(cfg.model)


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_every_config_is_tested():
    names = {path.stem for path in CONFIGS.glob('*_nus*.py')}
    assert names == {f'bevformer-v2_{name}_nus' for name in MODELS} | {
        f'bevformer-v2_flash-intern-image-{size}_offline_16xb1-24e_nus-trainval'
        for size in TRAINVAL}


@pytest.mark.parametrize('name', MODELS)
def test_size_frames_and_groups(name):
    parameters, frames, groups = MODELS[name]
    cfg = read(name)
    model = build(cfg)
    assert count(model) == parameters
    assert model.frames == frames and model.bev_head.num_groups == groups
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        assert tuple(loader.dataset.frames) == frames


def test_size_part_by_part():
    model = build(read('flash-intern-image-s_t8_16xb1-24e'))
    assert count(model.img_backbone) == 48_490_176 and count(model.img_neck) == 3_237_888
    assert count(model.perspective_head) == 7_405_973
    assert count(model.temporal_fusion) == 30_809_856
    assert count(model.bev_encoder.layers) == 4_940_928
    assert count(model.bev_head.layers) == 4_103_232
    assert count(model.bev_encoder.bev_embedding) == 10_240_000


@pytest.mark.parametrize('name', MODELS)
def test_recipe(name):
    cfg = read(name)
    epochs = 48 if '48e' in name else 24
    assert cfg.train_cfg.max_epochs == epochs and cfg.train_cfg.val_interval == 4
    warm_up, steps = cfg.param_scheduler
    assert (warm_up.end, warm_up.start_factor) == (2000, pytest.approx(1 / 3))
    assert (steps.milestones, steps.end) == ([epochs - 4], epochs)
    rate, batch = (5e-4, 32) if 'xl' in name else (4e-4, 16)
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=rate, weight_decay=0.01)
    assert cfg.auto_scale_lr.base_batch_size == batch and f'_{batch}xb1' in name
    if 'intern-image' in name:
        assert cfg.optim_wrapper.paramwise_cfg.layer_decay_rate == (0.94 if 'xl' in name else 0.96)
    assert cfg.optim_wrapper.clip_grad.max_norm == 35
    train = cfg.train_dataloader.dataset.pipeline
    kinds = [step.type for step in train]
    crop = train[kinds.index('MultiViewCropResize')]
    if 't1-base' in name:
        assert 'BEVAugment' not in kinds and tuple(crop.heights) == (640,)
    else:
        assert kinds.index('LoadAnnotations3D') < kinds.index('BEVAugment') < kinds.index(
            'ObjectRangeFilter')
        assert tuple(crop.heights) == tuple(range(512, 769, 32)) and crop.img_flip_prob == 0.5
    test = cfg.test_dataloader.dataset
    assert test.pipeline[1].heights == (640,) and test.test_mode
    assert cfg.model.bev_encoder.pc_range == cfg.point_cloud_range
    assert cfg.val_evaluator.modality.use_camera and not cfg.val_evaluator.modality.use_lidar


@pytest.mark.parametrize('size', TRAINVAL)
def test_train_and_val_to_the_test_server(size):
    """Both splits with annotations, nothing to validate on, and a file instead of a score."""
    name = f'flash-intern-image-{size}_offline_16xb1-24e'
    cfg = Config.fromfile(CONFIGS / f'bevformer-v2_{name}_nus-trainval.py')
    plain = read(name)
    assert count(build(cfg)) == TRAINVAL[size] and cfg.model == plain.model
    assert cfg.optim_wrapper == plain.optim_wrapper and cfg.param_scheduler == plain.param_scheduler
    train, val = cfg.train_dataloader.dataset.datasets
    assert train == plain.train_dataloader.dataset
    assert val == {**train, 'ann_file': 'nuscenes_infos_val.pkl'}
    assert cfg.val_dataloader is cfg.val_evaluator is cfg.val_cfg is None
    assert cfg.train_cfg == dict(type='EpochBasedTrainLoop', max_epochs=24)
    test = cfg.test_dataloader.dataset
    assert test.metainfo.version == 'v1.0-test' and test.load_eval_anns is False
    assert cfg.test_evaluator.ann_file == test.data_root + test.ann_file
    assert cfg.test_evaluator.format_only and cfg.test_evaluator.jsonfile_prefix


def test_layer_decay(tiny):
    cfg = read('flash-intern-image-s_t8_16xb1-24e')
    depths = (4, 4, 21, 4)
    assert layer_id('bev_encoder.level_embed', depths, head_embed_decay=False) == 34
    model = build(cfg)
    wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
    rate = {name: group['lr'] for group in wrapper.optimizer.param_groups
            for name in group['param_names']}
    assert rate['bev_encoder.level_embed'] == rate['bev_head.query_embedding.weight'] == 4e-4
    assert rate['img_backbone.patch_embed.conv1.weight'] == pytest.approx(4e-4 * 0.96**34)
    assert rate['img_backbone.levels.3.blocks.3.mlp.fc1.weight'] == pytest.approx(4e-4 * 0.96)


def test_the_backbone_of_the_resnet_learns_at_half_the_rate():
    cfg = read('r50_t1-base_16xb1-24e')
    wrapper = build_optim_wrapper(build(cfg), cfg.optim_wrapper)
    assert {group['lr'] for group in wrapper.optimizer.param_groups} == {2e-4, 4e-4}


def test_benchmark_of_a_training_step(rig, capsys):
    load_tool('analysis_tools/benchmark').main([
        str(TINY), '--training-data', '--repeats', '1', '--warm-up', '0', '--device', 'cpu',
        '--cfg-options', f'train_dataloader.dataset.data_root={rig}/'])
    assert '\n12 x 96 x 256: ' in capsys.readouterr().out  # two frames of six cameras
