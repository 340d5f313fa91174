# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""One training step and one prediction of every config, on real images through its pipelines.

What makes a recipe heavy is made smaller: one block per stage, every image size of a pipeline
divided by eight, and fewer boxes and queries. Widths, groups, necks, heads, losses, optimiser and
the steps of the pipelines are those of the recipe. BEVFormer v2 has tests of its own.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DATASETS, TRANSFORMS, DefaultScope

from helpers.zoo import LEAVES, SHARED_DATA, build_model, build_optimiser, read
from mmdcnv4.models.backbones.convnext_dcnv4 import ARCH_SETTINGS as CONVNEXT
from mmdcnv4.models.backbones.vit_dcnv4 import ARCH_SETTINGS as VIT

FACTOR = 8
SIZES = ('scale', 'scales', 'crop_size')
LAYERS = dict(DAT=4, FlashInternImage=4, InternImage=4, ResNet=4 + 6 + 3,  # deformable ones
              ConvNeXtDCNv4=4, ViTDCNv4=4, SwinTransformer=4, UNet=5 * 2 + 4 * 2 - 1)
PREDICTORS = ('offset_mask.weight', 'dcn.mask.weight', 'conv_offset.3.weight',
              'static_weight')  # in them, and what is learned at once in dynamic convolutions
QUERIES = 50  # of DINO; its maps must have that many positions
NAMES = [name for name in LEAVES if not name.startswith('bevformer_v2/')]
ORDER = ('mini', 'xxs', 'xs', 't', 's', 'b', 'l', 'xl', 'h')


HOSTS = ('convnext_dcnv4', 'dcnv4', 'vit_dcnv4')  # of DCNv4 in other networks


def cases():
    """All configs; slow are those whose parts other ones train.

    The default run has each method with each family of backbones, in the smallest size; of small
    recipes, which differ in the backbone alone, each method; with other networks only Mask R-CNN
    and the classifiers. Other tests build every config, count its parameters and compare its
    settings with the published ones.
    """
    first = {}
    ranked = []
    for name in NAMES:
        folder, file = name.split('/')
        algorithm, backbone = file.split('_')[:2]
        family, _, size = backbone.rpartition('-')
        family = dict(dat='dat-pp').get(family, family)  # the first version, in the same detector
        if folder == 'intern_image' and algorithm in ('cascade-mask-rcnn', 'dino-4scale'):
            continue  # the backbone is trained in Mask R-CNN, the head with FlashInternImage
        group = (folder, algorithm, '' if size == 'mini' or family == 'r18' else family)
        if folder in HOSTS and algorithm not in ('mask-rcnn', 'image-classifier'):
            continue
        ranked.append((ORDER.index(size) if size in ORDER else 0, name, group))
    for _, name, group in sorted(ranked):
        first.setdefault(group, name)
    kept = set(first.values())
    return [name if name in kept else pytest.param(name, marks=pytest.mark.slow)
            for name in NAMES]


def divide(sizes):
    if isinstance(sizes, (list, tuple)):
        return type(sizes)(map(divide, sizes))
    return max(sizes // FACTOR, 32)


def shrink(node):
    """A pipeline with all sizes divided."""
    if isinstance(node, dict):
        return {key: divide(value) if key in SIZES else shrink(value)
                for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [shrink(value) for value in node]
    return node


def inside(part):
    """The config of the module in which `with_dcnv4` replaces layers, or the config itself."""
    return part.module if part.type == 'with_dcnv4' else part


SMALL = ('bccd', 'camvid')  # datasets of small images, which keep their size


def has_small_images(cfg):
    return any(name in cfg.train_dataloader.dataset.get('data_root', '') for name in SMALL)


def make_smaller(cfg):
    """One block per stage, few boxes, predictions without a threshold, weights from scratch."""
    model = cfg.model
    backbone = inside(model.backbone)
    backbone.init_cfg = None
    if 'InternImage' in backbone.type:
        backbone.update(depths=(1, 1, 1, 1), drop_path_rate=0.0)  # every block takes part
        if backbone.get('arch') == 'h':
            backbone.level2_post_norm_block_ids = (0,)
    elif backbone.type == 'ConvNeXtDCNv4':
        widths = CONVNEXT[backbone.arch]['channels']
        backbone.update(arch=dict(depths=(1, 1, 1, 1), channels=widths), drop_path_rate=0.0)
    elif backbone.type == 'ViTDCNv4':
        backbone.update(arch=dict(VIT[backbone.arch], num_layers=4), drop_path_rate=0.0)
        if 'out_indices' in backbone:
            backbone.out_indices = (0, 1, 2, 3)
    elif backbone.type == 'SwinTransformer':
        backbone.update(depths=(1, 1, 1, 1), drop_path_rate=0.0)
    elif backbone.type == 'DAT':
        backbone.update(blocks=('ND', 'D', 'D', 'D'), drop_path_rate=0.0)
    elif backbone.type == 'DynamicMobileFormer':
        backbone.update(frozen_stages=-1, drop_path_rate=0.0)
    if 'size' in model.get('data_preprocessor', {}) and not has_small_images(cfg):
        model.data_preprocessor.size = divide(model.data_preprocessor.size)
    if 'num_queries' in model:
        model.num_queries = QUERIES
    if 'roi_head' in model:
        model.train_cfg.rpn_proposal.update(nms_pre=200, max_per_img=50)
        stages = model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 16
        model.test_cfg.rpn.update(nms_pre=200, max_per_img=50)
        model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=10)
    elif cfg.default_scope == 'mmdet' and 'test_cfg' in model:
        model.test_cfg.update(score_thr=0.0)


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
    from mmdcnv4.datasets.drawn_scenes import write_drawn_scenes
    return write_drawn_scenes(tmp_path_factory.mktemp('drawn') / 'scenes', 2, 2)


def real_images(cfg):
    """Options of a dataset that point it at real images."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f'needs the sample images in {SHARED_DATA}')
    for name in SMALL:
        if name in cfg.train_dataloader.dataset.data_root:
            return dict(data_root=f'{SHARED_DATA}/{name}/')
    if cfg.default_scope == 'mmdet':
        return dict(data_root=f'{SHARED_DATA}/coco_sample/', data_prefix=dict(img='images/'),
                    ann_file='annotations/instances_val2017.json')
    return dict(data_root=f'{SHARED_DATA}/ade20k_sample/', data_prefix=dict(
        img_path='images/validation', seg_map_path='annotations/validation'))


def load(cfg, loader, drawn):
    """Two images, each through the pipeline of `loader`."""
    options = Config(dict(dataset=cfg[loader].dataset))._cfg_dict.to_dict()['dataset']
    is_drawn = 'drawn_scenes' in options['data_root']
    if not is_drawn and not has_small_images(cfg):
        options['pipeline'] = shrink(options['pipeline'])
    import_module(f'{cfg.default_scope}.datasets')
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        if cfg.default_scope == 'mmpretrain':  # neither ImageNet nor its layout
            files = sorted((SHARED_DATA / 'coco_sample/images').glob('*.jpg'))
            pipeline = Compose([TRANSFORMS.build(step) for step in options['pipeline']])
            return [pipeline(dict(img_path=str(file), gt_label=label))
                    for file, label in zip(files, (3, 999))]
        if is_drawn:
            options['data_root'] = f'{drawn}/{Path(options["data_root"]).name}/'
        else:
            options.update(real_images(cfg))
        dataset = DATASETS.build(options)
        return [dataset[0], dataset[1]]


def check_detections(result, cfg):
    predictions = result.pred_instances
    count = len(predictions.scores)
    assert count > 0 and predictions.bboxes.shape == (count, 4)
    height, width = result.ori_shape
    assert ((predictions.bboxes >= -1) & (predictions.bboxes <= max(height, width) + 1)).all()
    assert ((predictions.scores >= 0) & (predictions.scores <= 1)).all()
    if cfg.model.get('roi_head'):
        assert predictions.masks.shape == (count, height, width)


def check_label_map(result, cfg):
    labels = result.pred_sem_seg.data
    assert labels.shape == (1, *result.ori_shape)
    assert 0 <= labels.min() <= labels.max() < cfg.model.decode_head.num_classes


def check_class(result, cfg):
    assert result.pred_score.shape == (cfg.model.head.num_classes,)
    assert result.pred_score.sum() == pytest.approx(1.0, abs=1e-4)


CHECKS = dict(mmdet=check_detections, mmseg=check_label_map, mmpretrain=check_class)


@pytest.mark.parametrize('name', cases())
def test_trains_and_predicts(name, drawn):
    cfg = read(name)
    make_smaller(cfg)
    batch = pseudo_collate(load(cfg, 'train_dataloader', drawn))
    images = load(cfg, 'test_dataloader', drawn)
    model = revert_sync_batchnorm(build_model(cfg))
    model.init_weights()
    wrapper = build_optimiser(cfg, model)
    before = {key: value.detach().clone() for key, value in model.backbone.named_parameters()
              if key.endswith(PREDICTORS)}
    backbone = inside(cfg.model.backbone)
    is_plain = (backbone.type == 'ResNet' and 'dcn' not in backbone
                or backbone.get('core_op') == 'SoftmaxDWConv')
    if backbone.type == 'DynamicMobileFormer':
        assert len(before) == 3 * len(model.backbone.blocks) + model.backbone.class_features
    else:
        assert len(before) == (0 if is_plain else LAYERS[backbone.type])
    model.train()
    # mmdet's ResNet starts its branches at zero: the first step reaches only their last norms
    for _ in range(2 if backbone.type == 'ResNet' else 1):
        with DefaultScope.overwrite_default_scope(cfg.default_scope):
            logs = model.train_step(batch, wrapper)
    assert all(torch.isfinite(value).all() for value in logs.values()), logs
    after = dict(model.backbone.named_parameters())
    assert [key for key, value in before.items() if torch.equal(after[key], value)] == []
    model.eval()
    with torch.no_grad(), DefaultScope.overwrite_default_scope(cfg.default_scope):
        results = [model.test_step(pseudo_collate([image])) for image in images]
    assert [len(result) for result in results] == [1, 1]
    for (result,) in results:
        CHECKS[cfg.default_scope](result, cfg)


@pytest.mark.parametrize('name', [name for name in LEAVES if '_dynamic-mobile-former' in name])
def test_no_batch_of_one_image(name):
    """The kernel attention normalises over the batch: a last batch of one would end a run."""
    cfg = read(name)
    norm = cfg.model.backbone.get('norm_cfg', dict(type='BN'))
    sampler = cfg.train_dataloader.get('batch_sampler') or cfg.train_dataloader
    assert norm['type'] == 'SyncBN' or sampler.get('drop_last')
