# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Every config: its name, what it inherits, that it builds, and how many parameters it has."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest
import torch
from mmengine.config import DictAction
from mmengine.registry import MODELS, DefaultScope

from helpers.zoo import BASES, CONFIGS, LEAVES, ZOO, build_model, build_optimiser, leaf, read

PART = r'[a-z0-9]+([-.][a-z0-9]+)*'
# {algorithm}_{components ...}_{devices}xb{images}-{schedule}_{dataset}; `_` between parts
LEAF_NAME = re.compile(rf'{PART}(_{PART})+_\d+xb\d+-\d+(\.\d+)?(e|k|x)_{PART}\.py')
BASE_NAME = re.compile(rf'{PART}(_{PART})*\.py')

T_1X = 'flash_intern_image/mask-rcnn_flash-intern-image-t_fpn_8xb2-1x_coco.py'
R50_DCNV4 = 'dcnv4/mask-rcnn_r50-dcnv4-c3-c5_fpn_8xb2-1x_coco.py'


def convnext(depths, widths, plain):
    """A ConvNeXt whose classifier has `plain` parameters, with DCNv4 and norms for four maps."""
    dcn = [-(-27 * width // 256) * 8 * (width + 1) - 50 * width for width in widths]
    return (plain - 1000 * (widths[-1] + 1) + sum(map(int.__mul__, depths, dcn))
            + 2 * sum(widths[:3]))


def fpn(widths):
    """mmdet's neck with biases."""
    return sum(256 * width + 256 + 9 * 256 * 256 + 256 for width in widths)


def upernet(widths):
    """mmseg's decode head with 512 channels and auxiliary head with 256, for 150 classes."""
    def conv(inner, outer, kernel):
        return inner * outer * kernel**2 + 2 * outer  # with a batch norm
    last = widths[-1]
    decode = (4 * conv(last, 512, 1) + conv(last + 4 * 512, 512, 3) + conv(4 * 512, 512, 3)
              + sum(conv(width, 512, 1) + conv(512, 512, 3) for width in widths[:3]))
    return decode + conv(widths[2], 256, 3) + 150 * (512 + 1) + 150 * (256 + 1)


CONVNEXT_T = convnext((3, 3, 9, 3), (96, 192, 384, 768), 28_589_128)
CONVNEXT_S = convnext((3, 3, 27, 3), (96, 192, 384, 768), 50_223_688)
VIT_B = 78_371_656 - 1000 * 769
MASK_RCNN, CASCADE = 17_543_920, 55_379_122  # the heads

# Parameters of whole models by the arithmetic of the architecture: blocks, necks, heads.
EXACT = {
    'mask-rcnn_flash-intern-image-t_fpn_8xb2-1x': 48_819_696,
    'mask-rcnn_flash-intern-image-t_fpn_8xb2-3x': 48_819_696,
    'mask-rcnn_flash-intern-image-s_fpn_8xb2-1x': 68_704_688,
    'mask-rcnn_flash-intern-image-s_fpn_8xb8-3x': 68_704_688,
    'mask-rcnn_flash-intern-image-b_fpn_8xb2-1x': 115_234_440,
    'mask-rcnn_flash-intern-image-b_fpn_16xb4-3x': 115_234_440,
    'cascade-mask-rcnn_flash-intern-image-l_fpn_8xb2-1x': 277_271_554,
    'cascade-mask-rcnn_flash-intern-image-l_fpn_16xb4-3x': 277_271_554,
    # the neck of Mask R-CNN B and the heads of Cascade L
    'cascade-mask-rcnn_flash-intern-image-b_fpn_8xb2-1x': 94_897_048 + 2_793_472 + 55_379_122,
    'upernet_flash-intern-image-t': 58_974_252,
    'upernet_flash-intern-image-s': 79_854_572,
    'upernet_flash-intern-image-b': 128_374_980,
    'upernet_flash-intern-image-l': 255_562_876,
    'image-classifier_convnext-dcnv4-t': CONVNEXT_T + 769_000 - 2 * 672,
    'image-classifier_convnext-dcnv4-s': CONVNEXT_S + 769_000 - 2 * 672,
    'image-classifier_convnext-dcnv4-b': 96_539_376,
    'image-classifier_convnext-softmax-b': 88_591_464,
    'mask-rcnn_convnext-dcnv4-t': CONVNEXT_T + fpn((96, 192, 384, 768)) + MASK_RCNN,
    'cascade-mask-rcnn_convnext-dcnv4-t': CONVNEXT_T + fpn((96, 192, 384, 768)) + CASCADE,
    'cascade-mask-rcnn_convnext-dcnv4-s': CONVNEXT_S + fpn((96, 192, 384, 768)) + CASCADE,
    'upernet_convnext-dcnv4-b': 96_539_376 - 1_025_000 + 2 * 896 + upernet((128, 256, 512, 1024)),
    'image-classifier_vit-dcnv4-t': 5_216_776, 'image-classifier_vit-dcnv4-s': 20_017_096,
    'image-classifier_vit-dcnv4-b': 78_371_656,
    'mask-rcnn_vit-dcnv4-b': VIT_B + 5_560_000 + MASK_RCNN,
    # the neck: three transposed convolutions of 2x2 and a batch norm
    'upernet_vit-dcnv4-b': VIT_B + 3 * (4 * 768 * 768 + 768) + 2 * 768 + upernet((768,) * 4),
    'image-classifier_flash-intern-image-t': 29_815_528,
    'image-classifier_flash-intern-image-s': 50_067_496,
    'image-classifier_flash-intern-image-b': 97_448_960,
    'image-classifier_flash-intern-image-l': 223_297_080,
    'image-classifier_dat-pp-t': 23_962_876,
    'image-classifier_dat-pp-s': 53_127_366,
    'image-classifier_dat-pp-b_16xb64-300e': 93_690_640,
    'image-classifier_dat-pp-b_16xb24-30e': 93_690_640,
    # the classifier without its norm and linear layer, four norms, the neck and the heads
    **dict.fromkeys(
        ('cascade-mask-rcnn_dat-t_fpn_32xb2-1x', 'cascade-mask-rcnn_dat-t_fpn_32xb2-3x'),
        28_319_138 - 2 * 768 - 769_000 + 2 * 1440 + 1440 * 256 + 2_361_344 + 55_379_122),
    'image-classifier_dynamic-mobile-former-xxs': 15_075_208,
    'image-classifier_dynamic-mobile-former-xs': 19_805_516,
    'image-classifier_dynamic-mobile-former-s': 25_145_252,
}
# InternImage: backbones (T with the layer scale of dense prediction), and mmdet's neck, which has
# biases instead of norms.
INTERN_IMAGE = {'t': 28_754_672 + 14_848, 's': 48_502_560, 'b': 94_909_920, 'l': 218_952_370,
                'xl': 328_971_228, 'h': 1_073_122_480}
WIDTH = dict(t=64, s=80, b=112, l=160, xl=192, h=320)
for _size, _count in INTERN_IMAGE.items():
    _neck = 15 * WIDTH[_size] * 256 + 4 * 256 + 4 * (9 * 256 * 256 + 256)
    EXACT[f'upernet_intern-image-{_size}_'] = (  # its heads grow linearly with the width
        _count + 58_974_252 - 28_666_624 + (WIDTH[_size] - 64) * 66_048)
    if _size in ('l', 'xl'):
        EXACT[f'cascade-mask-rcnn_intern-image-{_size}_fpn_8xb2-1x'] = _count + _neck + 55_379_122
        EXACT[f'cascade-mask-rcnn_intern-image-{_size}_fpn_32xb2-3x'] = _count + _neck + 55_379_122
    elif _size != 'h':
        EXACT[f'mask-rcnn_intern-image-{_size}_fpn_8xb2-1x'] = _count + _neck + 17_543_920
        EXACT[f'mask-rcnn_intern-image-{_size}_fpn_8xb2-3x'] = _count + _neck + 17_543_920
EXACT.update({f'image-classifier_intern-image-{_size}_': _count for _size, _count in dict(
    t=29_918_424, s=50_079_880, b=97_461_832, l=223_334_810, xl=334_819_780).items()})
# Known to 10,000 parameters.
MILLIONS = {
    'dino-4scale_flash-intern-image-t': 48.63, 'dino-4scale_flash-intern-image-s': 68.81,
    'dino-4scale_intern-image-t': 48.74, 'dino-4scale_intern-image-l': 241.03,
    'dino-4scale_flash-intern-image-b': 115.92, 'dino-4scale_flash-intern-image-l': 241.00,
    'mask2former_flash-intern-image-t': 48.46, 'mask2former_flash-intern-image-s': 71.55,
    'mask2former_flash-intern-image-b': 118.08, 'mask2former_flash-intern-image-l': 242.28,
    # the neck has three stages (C3 to C5) and two more levels; the head is that of R50
    'retinanet_flash-intern-image-t': 38.90,
    'retinanet_dat-pp-t_fpn_32xb2-1x': 33.68, 'retinanet_dat-pp-t_fpn_32xb2-3x': 33.68,
    'retinanet_dat-pp-s_fpn_32xb2-1x': 63.30, 'retinanet_dat-pp-s_fpn_32xb2-3x': 63.30,
    'retinanet_dynamic-mobile-former-xxs': 19.35, 'retinanet_dynamic-mobile-former-xs': 22.33,
    'retinanet_dynamic-mobile-former-s': 26.00,
    'mask-rcnn_dynamic-mobile-former-s_fpn_8xb2-1x': 36.54,
    'mask-rcnn_dynamic-mobile-former-s_fpn_8xb2-3x': 36.54,
    # with a strided convolution for the fifth level of the neck
    'mask-rcnn_dat-pp-t_fpn_32xb2-1x': 44.78, 'mask-rcnn_dat-pp-t_fpn_32xb2-3x': 44.78,
    'mask-rcnn_dat-pp-s_fpn_32xb2-1x': 74.40, 'mask-rcnn_dat-pp-s_fpn_32xb2-3x': 74.40,
    'cascade-mask-rcnn_dat-pp-t_fpn_32xb2-1x': 81.44,
    'cascade-mask-rcnn_dat-pp-t_fpn_32xb2-3x': 81.44, 'cascade-mask-rcnn_dat-pp-s': 110.47,
    'cascade-mask-rcnn_dat-pp-b': 150.90,
    'upernet_dat-pp-t': 53.76, 'upernet_dat-pp-s': 84.78, 'upernet_dat-pp-b': 127.20,
    'semantic-fpn_dat-pp-t': 27.70, 'semantic-fpn_dat-pp-s': 56.73,
    'semantic-fpn_dat-pp-b': 97.16,
}
# T has two layer scales per block in dense prediction, and none in the classifier.
BACKBONE = {'t': 28_651_776, 's': 48_490_176, 'b': 94_897_048, 'l': 218_914_640}
T_LAYER_SCALE = 2 * (4 * 64 + 4 * 128 + 18 * 256 + 4 * 512)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def entries(node):
    """All keys of a config, at any depth."""
    if isinstance(node, dict):
        yield from node
        for value in node.values():
            yield from entries(value)
    elif isinstance(node, (list, tuple)):
        for value in node:
            yield from entries(value)


@pytest.mark.parametrize('name', LEAVES)
def test_leaf_name(name):
    assert LEAF_NAME.fullmatch(Path(name).name), name


@pytest.mark.parametrize('name', BASES)
def test_base_name(name):
    assert BASE_NAME.fullmatch(Path(name).name), name


@pytest.mark.parametrize('name', [
    'mask-rcnn_r50_fpn_1x_coco', 'Mask-RCNN_r50_fpn_8xb2-1x_coco', 'mask-rcnn_r50_8xb2-1x',
    'mask-rcnn_r50_fpn_8xb2_coco', 'mask-rcnn_r50__fpn_8xb2-1x_coco', 'mask-rcnn_8xb2-1x_coco'])
def test_grammar_refuses(name):
    assert LEAF_NAME.fullmatch(name + '.py') is None


@pytest.mark.parametrize('name', LEAVES)
def test_name_says_batch_size_and_schedule(name):
    cfg = read(name)
    devices, images, length, unit = re.search(r'_(\d+)xb(\d+)-([\d.]+)(e|k|x)_', name).groups()
    assert cfg.train_dataloader.batch_size == int(images)
    assert cfg.auto_scale_lr.base_batch_size == int(devices) * int(images)
    if unit == 'k':
        assert cfg.train_cfg.max_iters == 1000 * float(length)
    else:
        assert cfg.train_cfg.max_epochs == int(length) * (12 if unit == 'x' else 1)


@pytest.mark.parametrize('name', LEAVES)
def test_builds(name):
    """On the meta device: no memory, no initialisation, all shapes."""
    cfg = read(name)
    assert 'mmdcnv4' in cfg.custom_imports.imports
    assert '_delete_' not in set(entries(cfg)), 'of a dict inside a deleted one'
    # mmdet's Swin reads the values of a tensor
    model = build_model(cfg, 'cpu' if '_swin' in name else 'meta')
    wrapper = build_optimiser(cfg, model)
    optimised = [p for group in wrapper.optimizer.param_groups for p in group['params']]
    assert len({id(p) for p in optimised}) == len(optimised)
    assert {id(p) for p in model.parameters() if p.requires_grad} <= {id(p) for p in optimised}
    stem = Path(name).name if name in ZOO else ''
    exact = [count for start, count in EXACT.items() if stem.startswith(start)]
    millions = [count for start, count in MILLIONS.items() if stem.startswith(start)]
    assert len(exact) + len(millions) == (name in ZOO), 'every recipe has one count'
    for count in exact:
        assert parameters(model) == count
    for count in millions:
        assert parameters(model) / 1e6 == pytest.approx(count, abs=0.005)
    size = re.search('_flash-intern-image-([tsbl])_', name)
    if name in ZOO and size is not None:
        extra = T_LAYER_SCALE if size[1] == 't' and 'classifier' not in name else 0
        assert parameters(model.backbone) == BACKBONE[size[1]] + extra


@pytest.mark.parametrize('name', [name for name in LEAVES
                                  if Path(name).name.startswith(('upernet', 'semantic-fpn'))])
def test_losses_of_segmentors_take_padding(name):
    """255 is what mmsegmentation pads label maps with."""
    cfg = read(name)
    pytest.importorskip('mmseg.models')
    for head in (cfg.model[key] for key in ('decode_head', 'auxiliary_head') if key in cfg.model):
        with DefaultScope.overwrite_default_scope('mmseg'):
            loss = MODELS.build(head.loss_decode)
        logits = torch.zeros(1, head.num_classes, 4, 4, requires_grad=True)
        labels = torch.arange(16).reshape(1, 4, 4) % head.num_classes
        for count in (0, 1, 15, 16):  # pixels that are padded
            labels.view(-1)[:count] = 255
            value = loss(logits, labels, ignore_index=255)
            assert value.isfinite() and (value > 0) == (count < 16)
            assert torch.autograd.grad(value, logits)[0].isfinite().all()


def test_every_count_is_used():
    for start in (*EXACT, *MILLIONS):
        assert leaf(start)


@pytest.mark.parametrize('name', LEAVES + BASES)
def test_no_machine_paths(name):
    text = (CONFIGS / name).read_text()
    assert not re.search(r'[\'"](/|~|[A-Za-z]:\\|s3://)', text)
    assert not re.search(r'AP\s*[=:]\s*\d', text)  # results stand in README.md


def test_there_are_configs():
    assert T_1X in LEAVES and R50_DCNV4 in LEAVES and '_base_/plugin.py' in BASES


def test_t_1x_model():
    model = build_model(read(T_1X))
    assert sum(p.numel() for p in model.parameters()) == 48_819_696
    assert sum(p.numel() for p in model.neck.parameters()) == 2_609_152
    rates = [block.drop_path.drop_prob for level in model.backbone.levels for block in level.blocks]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.2) and len(rates) == 30
    blocks = [block for level in model.backbone.levels for block in level.blocks]
    assert all(block.with_cp and (block.gamma1 == 1).all() for block in blocks)


def test_absent_weights_and_training_from_scratch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = read(T_1X)
    with pytest.raises(FileNotFoundError) as caught:
        build_model(cfg).init_weights()
    message = str(caught.value)
    assert 'checkpoints/flash_intern_image_t_1k_224.pth' in message
    assert 'OpenGVLab/DCNv4' in message
    # the way out that the message names, as the tools read it
    option = re.search(r'--cfg-options (\S+)', message)
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    cfg.merge_from_dict(parser.parse_args(option.group(0).split()).cfg_options)
    assert cfg.model.backbone.init_cfg is None
    model = build_model(cfg)
    model.init_weights()
    assert not model.backbone.levels[0].blocks[0].dcn.offset_mask.weight.any()
