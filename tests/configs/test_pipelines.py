# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What other programs read from the top level of a config, and how much a training keeps."""

from __future__ import annotations

from importlib import import_module

import numpy as np
import pytest
from mmengine.dataset import Compose
from mmengine.registry import TRANSFORMS, DefaultScope

from helpers.zoo import LEAVES, leaf, read
from mmdcnv4.cli.config import apply_data_root
from mmdcnv4.errors import UserError

# Height and width of a test image of 512 x 683 as the network sees it: the short side becomes 512,
# 640 or 896, and both sides multiples of 32 (512 x 682.67, 640 x 853.75 and 896 x 1195.25 before).
MULTIPLE, PLAIN = {512: (512, 704), 640: (640, 864), 896: (896, 1216)}, (512, 683)


def pipeline_of(loader):
    dataset = loader.dataset
    while 'pipeline' not in dataset:  # RepeatDataset, ConcatDataset and the like
        dataset = dataset.dataset if 'dataset' in dataset else dataset.datasets[0]
    return dataset.pipeline


def plain(node):
    """Without the scopes that inheriting from another library adds."""
    if isinstance(node, dict):
        return {key: plain(value) for key, value in node.items() if key != '_scope_'}
    return [plain(item) for item in node] if isinstance(node, (list, tuple)) else node


@pytest.mark.parametrize('name', LEAVES)
def test_top_level_pipelines_are_those_in_use(name):
    """`inference_model` of mmseg, and programs of users, read them there."""
    cfg = read(name)
    for split in ('train', 'val', 'test'):
        if cfg[f'{split}_dataloader'] is None:
            continue
        own = cfg.get(f'{split}_pipeline')
        assert own is None or plain(own) == plain(pipeline_of(cfg[f'{split}_dataloader'])), split
    if cfg.val_dataloader is not None:
        assert plain(pipeline_of(cfg.val_dataloader)) == plain(pipeline_of(cfg.test_dataloader))
    if cfg.default_scope == 'mmseg':
        assert 'test_pipeline' in cfg
    if 'tta_pipeline' not in cfg or 'img_ratios' not in cfg:
        return
    (scales,) = [steps for steps in cfg.tta_pipeline[-1].transforms if 'scale' in steps[0]]
    (scale,) = [step.scale for step in cfg.test_pipeline if step.type == 'Resize']
    assert [step.scale for step in scales] == [
        tuple(int(side * ratio) for side in scale) for ratio in cfg.img_ratios]
    assert ('ResizeToMultiple' in str(cfg.tta_pipeline)) == (
        'ResizeToMultiple' in str(cfg.test_pipeline))


@pytest.mark.parametrize('start, size', [
    ('mask2former_flash-intern-image-t', MULTIPLE[512]),
    ('mask2former_flash-intern-image-s', MULTIPLE[640]),
    ('mask2former_flash-intern-image-b', MULTIPLE[640]),
    ('mask2former_flash-intern-image-l', MULTIPLE[640]),
    ('upernet_flash-intern-image-t', PLAIN),
    ('upernet_flash-intern-image-s', MULTIPLE[512]),
    ('upernet_flash-intern-image-b', MULTIPLE[512]),
    ('upernet_flash-intern-image-l', MULTIPLE[640]),
    ('upernet_intern-image-t', MULTIPLE[512]), ('upernet_intern-image-h', MULTIPLE[896]),
    ('upernet_dat-pp-t', PLAIN), ('semantic-fpn_dat-pp-t', PLAIN)])
def test_demo_and_test_see_the_same_size(start, size):
    pytest.importorskip('mmseg')
    import_module('mmseg.datasets')
    cfg = read(leaf(start))
    for pipeline in (cfg.test_pipeline, pipeline_of(cfg.test_dataloader)):
        steps = [step for step in pipeline
                 if step.type not in ('LoadImageFromFile', 'LoadAnnotations')]
        with DefaultScope.overwrite_default_scope('mmseg'):
            sample = Compose([TRANSFORMS.build(step) for step in steps])(dict(
                img=np.zeros((512, 683, 3), np.uint8), img_shape=(512, 683),
                ori_shape=(512, 683)))
        assert tuple(sample['inputs'].shape[1:]) == size


@pytest.mark.parametrize('name', LEAVES)
def test_no_training_fills_a_disk(name):
    """A classifier that keeps all of its 300 checkpoints leaves 144 GB behind."""
    hook = read(name).default_hooks.checkpoint
    assert 1 <= hook.get('max_keep_ckpts', -1) <= 3


def paths_below(node, root):
    """All texts of a config that begin with a folder."""
    if isinstance(node, dict):
        return [path for value in node.values() for path in paths_below(value, root)]
    if isinstance(node, (list, tuple)):
        return [path for value in node for path in paths_below(value, root)]
    return [node] if isinstance(node, str) and node.startswith(root) else []


@pytest.mark.parametrize('start', [
    'flash_intern_image/mask-rcnn_flash-intern-image-t_fpn_8xb2-1x', 'dat/upernet_dat-pp-t',
    'flash_intern_image/image-classifier_flash-intern-image-t', 'real_images/retinanet_r18',
    'quick_start/upernet_flash', 'bevformer_v2/bevformer-v2_r50_t1-base_16xb1-24e'])
def test_one_option_moves_the_data(start, tmp_path):
    (name,) = [name for name in LEAVES if name.startswith(start)]
    cfg = read(name)
    before = paths_below(cfg._cfg_dict, 'data/')
    assert len(before) >= 3  # three datasets, and the metrics of detection
    apply_data_root(cfg, str(tmp_path))
    assert paths_below(cfg._cfg_dict, 'data/') == []
    after = paths_below(cfg._cfg_dict, str(tmp_path))
    assert [path.rstrip('/').split('/')[-1] for path in before if 'json' in path or 'pkl' in path
            ] == [path.split('/')[-1] for path in after if 'json' in path or 'pkl' in path]
    assert len(after) == len(before)


def test_a_folder_that_cannot_be_the_data_is_named(tmp_path):
    cfg = read('real_images/retinanet_r18_fpn_1xb4-36e_bccd-320x240.py')
    with pytest.raises(UserError, match='--data-root /no/such: the folder does not exist'):
        apply_data_root(cfg, '/no/such')
    cfg.val_dataloader.dataset.data_root = 'elsewhere/'
    with pytest.raises(UserError, match='replaces one folder, and the config has'):
        apply_data_root(cfg, str(tmp_path))
