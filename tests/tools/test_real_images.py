# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Full-size detectors on real photographs: training, a test, pictures, and the README's example."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from helpers.tool_runner import REPOSITORY, TOOLS, load_tool, run_command, start_tool
from mmdcnv4.models.backbones import FlashInternImage

CONFIG = (REPOSITORY / 'configs/flash_intern_image'
          / 'mask-rcnn_flash-intern-image-t_fpn_8xb2-1x_coco.py')
SHARED = Path(os.environ.get('MMDCNV4_SHARED', REPOSITORY.parent / 'shared'))
SAMPLE = SHARED / 'data/coco_sample'
NAMES = ['000000142238.jpg', '000000439180.jpg']

needs_sample = pytest.mark.skipif(
    not SAMPLE.is_dir(), reason=f'{SAMPLE} does not exist (set MMDCNV4_SHARED)')


def options(**more: object) -> list[str]:
    """The sample as training and as test data, one image at a time, at a quarter of the size."""
    annotations = f'{SAMPLE}/annotations/instances_val2017.json'
    entries = ['model.test_cfg.rcnn.score_thr=0.0',  # an untrained model is sure of nothing
               'default_hooks.logger.interval=1', 'train_dataloader.batch_size=1',
               'train_dataloader.dataset.pipeline.2.scale=(333,200)']
    for loader in ('train', 'val', 'test'):
        dataset = f'{loader}_dataloader.dataset'
        entries += [f'{dataset}.data_root={SAMPLE}/', f'{dataset}.ann_file={annotations}',
                    f'{dataset}.data_prefix.img=images/', f'{loader}_dataloader.num_workers=0',
                    f'{loader}_dataloader.persistent_workers=False']
        if loader != 'train':
            entries += [f'{dataset}.pipeline.1.scale=(333,200)',
                        f'{loader}_evaluator.ann_file={annotations}']
    return ['--cfg-options', *entries, *(f'{key}={value}' for key, value in more.items())]


FROM_SCRATCH = {'model.backbone.init_cfg': None, 'train_cfg.max_epochs': 1}


def losses_of(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r' loss: ([\d.naif]+)', output)]


@needs_sample
def test_an_epoch_and_a_test_on_photographs(tmp_path: Path) -> None:
    output = run_command('python', TOOLS / 'train.py', CONFIG, '--work-dir', tmp_path / 'work',
                         *options(**FROM_SCRATCH))
    losses = losses_of(output)
    assert len(losses) == 2 and np.isfinite(losses).all()
    assert 'coco/segm_mAP' in output
    checkpoint = tmp_path / 'work/epoch_1.pth'

    metrics = load_tool('test').main([
        str(CONFIG), str(checkpoint), '--work-dir', str(tmp_path / 'test'), '--show-dir',
        str(tmp_path / 'shown'), '--out', str(tmp_path / 'out.pkl'), *options(**FROM_SCRATCH)])
    assert 'coco/bbox_mAP' in metrics
    results = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert [Path(result['img_path']).name for result in results] == NAMES

    load_tool('demo/image_demo').main([
        str(SAMPLE / 'images'), str(CONFIG), str(checkpoint), '--out-dir', str(tmp_path / 'demo'),
        '--score-thr', '0.01', '--device', 'cpu', *options(**FROM_SCRATCH)])
    for name in NAMES:
        original = cv2.imread(str(SAMPLE / 'images' / name))
        for folder in ('shown', 'demo'):
            assert cv2.imread(str(tmp_path / folder / name)) is not None, (folder, name)
        assert not np.array_equal(cv2.imread(str(tmp_path / 'demo' / name)), original)


def first_example() -> str:
    """The first config in the README, word for word."""
    blocks = re.findall(r'```python\n(.*?)```', (REPOSITORY / 'README.md').read_text(), re.DOTALL)
    return next(block for block in blocks if '_base_' in block)


@needs_sample
def test_the_first_example_of_the_readme_learns(tmp_path: Path) -> None:
    """Six steps on two photographs, from a file of weights of the name that it gives.

    They are taken without the warm-up, which has 500 steps.
    """
    text = first_example()
    (checkpoint,) = re.findall(r"checkpoint='([^']+)'", text)
    (tmp_path / checkpoint).parent.mkdir()
    torch.save(dict(model=FlashInternImage('t').state_dict()), tmp_path / checkpoint)
    (tmp_path / 'my_config.py').write_text(text)
    process = start_tool('train.py', 'my_config.py', '--work-dir', 'work', *options(**{
        'train_cfg.max_epochs': 3, 'train_cfg.val_interval': 4, 'randomness.seed': 0,
        'param_scheduler.0.start_factor': 1.0, 'log_processor.window_size': 1,
        'default_hooks.checkpoint.interval': 4}), cwd=tmp_path)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output[-4000:]
    assert 'layer decay: ' in output and ' tensors matched; ' in output, output[:4000]
    losses = losses_of(output)
    assert len(losses) == 6 and np.isfinite(losses).all()
    assert sum(losses[-2:]) < 0.8 * sum(losses[:2]), losses  # both images each
