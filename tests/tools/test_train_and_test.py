# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Runs of the tools: kill and resume, two processes, test and pictures, other libraries."""

from __future__ import annotations

import json
import pickle
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from torch import Tensor, nn

from helpers.tool_runner import TINY, TOOLS, data_options, load_tool, run_command, start_tool
from mmdcnv4.cli import checkpoints, distributed

DETECTOR = TINY / 'mask_rcnn.py'


def free_port() -> int:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]


def load(file: Path) -> dict:
    checkpoints.allow_mmengine_checkpoints()
    return torch.load(file, map_location='cpu')


def scalars(work_dir: Path) -> dict[int, dict]:
    """What was logged for each iteration; what a run repeated after a kill replaces the rest."""
    logged = {}
    for file in sorted(work_dir.glob('*/vis_data/scalars.json')):
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if 'loss' in record:
                logged[record['iter']] = record
    return logged


@pytest.fixture(scope='module')
def uninterrupted(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work directory of a run of four epochs with eight iterations each."""
    work_dir = tmp_path_factory.mktemp('uninterrupted')
    run_command('python', TOOLS / 'train.py', DETECTOR, '--work-dir', work_dir,
                *data_options(scenes, **{'train_cfg.max_epochs': 4, 'max_epochs': 4,
                                         'train_cfg.val_interval': 4}))
    return work_dir


# ------------------------------------------------------------------------------ kill and resume


def kill_behind(process: object, checkpoint: Path) -> None:
    """Kills the process without warning once it trains on behind `checkpoint`."""
    pointer = checkpoint.parent / 'last_checkpoint'
    output = []
    for line in process.stdout:
        output.append(line)
        if (pointer.is_file() and checkpoint.name in pointer.read_text()
                and re.search(r'Epoch\(train\) +\[3\]\[[34]/8\]', line)):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait(60) == -signal.SIGKILL, ''.join(output)[-4000:]


def test_killed_run_resumes_to_the_same_weights(scenes: Path, uninterrupted: Path,
                                                tmp_path: Path) -> None:
    options = data_options(scenes, **{'train_cfg.max_epochs': 4, 'train_cfg.val_interval': 4})
    command = ['train.py', DETECTOR, '--work-dir', tmp_path / 'work', *options]
    kill_behind(start_tool(*command), tmp_path / 'work/epoch_2.pth')
    assert not (tmp_path / 'work/epoch_3.pth').exists()

    process = start_tool(*command, '--resume')
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output[-4000:]
    assert re.search(r'resumed epoch: 2, iter: 16', output)

    expected, found = scalars(uninterrupted), scalars(tmp_path / 'work')
    assert sorted(found) == sorted(expected) == list(range(1, 33))
    for iteration, record in expected.items():
        assert found[iteration]['lr'] == record['lr'], iteration
        assert found[iteration]['loss'] == pytest.approx(record['loss'], rel=1e-5), iteration
    first, second = (load(folder / 'epoch_4.pth') for folder in (uninterrupted, tmp_path / 'work'))
    assert second['meta']['iter'] == 32
    for name, weight in first['state_dict'].items():
        torch.testing.assert_close(second['state_dict'][name], weight, msg=name)
    moments = [content['optimizer']['state'] for content in (first, second)]
    for index, state in moments[0].items():
        torch.testing.assert_close(moments[1][index]['exp_avg'], state['exp_avg'])


# ----------------------------------------------------------------------------------- two processes


def test_two_processes_on_the_cpu(scenes: Path, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('PORT', str(free_port()))
    output = run_command('bash', TOOLS / 'dist_train.sh', DETECTOR, 2, '--work-dir',
                         tmp_path / 'work', *data_options(scenes, **{
                             'train_cfg.max_epochs': 1, 'train_cfg.val_interval': 1}))
    # 16 images, 2 at a time on each of 2 processes
    assert re.search(r'Epoch\(train\) +\[1\]\[4/4\]', output)
    assert re.search(r'Epoch\(val\) +\[1\]\[2/2\] +coco/bbox_mAP', output)
    assert len(re.findall(r'Epoch\(train\) +\[1\]\[4/4\]', output)) == 1, 'only rank 0 logs'
    assert load(tmp_path / 'work/epoch_1.pth')['meta']['iter'] == 4

    monkeypatch.setenv('PORT', str(free_port()))
    output = run_command('bash', TOOLS / 'dist_test.sh', DETECTOR, tmp_path / 'work/epoch_1.pth',
                         2, '--work-dir', tmp_path / 'test', '--out', tmp_path / 'out.pkl',
                         *data_options(scenes))
    assert 'coco/segm_mAP' in output
    results = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert sorted(result['img_id'] for result in results) == [1, 2, 3, 4, 5, 6]


def test_no_thread_of_gloo_outlives_the_run(scenes: Path, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    """One that still holds a tensor while Python shuts down aborts a run that is done."""
    for name, value in dict(RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR='127.0.0.1',
                            MASTER_PORT=free_port()).items():
        monkeypatch.setenv(name, str(value))
    program = ('import runpy, sys; from pathlib import Path; sys.argv.pop(0); '
               'runpy.run_path(sys.argv[0], run_name="__main__"); '
               'print("threads:", *{path.read_text().strip() for path in '
               'Path("/proc/self/task").glob("*/comm")})')
    output = run_command(sys.executable, '-c', program, TOOLS / 'train.py', DETECTOR,
                         '--launcher', 'pytorch', '--work-dir', tmp_path / 'work',
                         *data_options(scenes, **{'train_cfg.max_epochs': 1}))
    assert re.search(r'Epoch\(train\) +\[1\]\[8/8\]', output)
    threads = output.split('threads:')[-1].split()
    assert threads and not any('gloo' in name for name in threads), threads


class Regression(nn.Module):
    """A model without batch statistics, with the interface of MMEngine's models."""

    def __init__(self) -> None:
        super().__init__()
        from mmdcnv4.models.backbones import FlashInternImage
        self.backbone = FlashInternImage(channels=8, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8),
                                         drop_path_rate=0.0)

    def forward(self, images: Tensor) -> Tensor:
        """Mean over the batch of a loss per image."""
        return sum((maps ** 3).mean(dim=(1, 2, 3)) for maps in self.backbone(images)).mean()


def make_model_and_images() -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = Regression().double()
    for parameter in model.parameters():  # away from the zero start of the offsets
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator).double()
    return model, torch.randn(4, 3, 33, 47, generator=generator).double()


def distributed_gradients(rank: int, port: int, folder: str) -> None:
    """What one of two processes computes, by the code path of the tools."""
    import os

    from mmengine.registry import MODEL_WRAPPERS
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2',
                      MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), CUDA_VISIBLE_DEVICES='-1')
    torch.set_num_threads(1)
    cfg = Config(dict(launcher='pytorch', model=dict(type='Regression')))
    distributed.prepare_distributed(cfg)
    model, images = make_model_and_images()
    wrapped = MODEL_WRAPPERS.build(cfg.model_wrapper_cfg, default_args=dict(module=model))
    share = images[2 * rank:2 * rank + 2]
    wrapped(share).backward()
    torch.save({name: parameter.grad for name, parameter in model.named_parameters()},
               f'{folder}/{rank}.pth')
    # Freeing the wrapper can hang: torch ends gloo's thread with Python's lock in hand, and that
    # thread may wait for the lock. Both processes have what they need from each other.
    torch.distributed.barrier()
    os._exit(0)


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(distributed_gradients, (free_port(), str(tmp_path)), nprocs=2)
    model, images = make_model_and_images()
    model(images).backward()
    for rank in range(2):
        found = torch.load(tmp_path / f'{rank}.pth')
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad, rtol=1e-9, atol=1e-12,
                                       msg=lambda text, name=name: f'{name}: {text}')
            assert parameter.grad.abs().max() > 0, name


# ------------------------------------------------------------------------- test.py and image_demo


def test_pictures_and_predictions(scenes: Path, uninterrupted: Path, tmp_path: Path) -> None:
    checkpoint = uninterrupted / 'epoch_4.pth'
    metrics = load_tool('test').main([
        str(DETECTOR), str(checkpoint), '--work-dir', str(tmp_path / 'work'), '--show-dir',
        str(tmp_path / 'shown'), '--out', str(tmp_path / 'out.pkl'),
        *data_options(scenes, experiment_name=tmp_path.name)])
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= set(metrics)
    for number in range(1, 7):
        assert cv2.imread(str(tmp_path / f'shown/{number:06d}.jpg')).ndim == 3
    results = pickle.loads((tmp_path / 'out.pkl').read_bytes())
    assert [result['img_id'] for result in results] == [1, 2, 3, 4, 5, 6]

    folder = tmp_path / 'images'
    folder.mkdir()
    for number in (1, 2):
        name = f'{number:06d}.jpg'
        (folder / name).write_bytes((scenes / 'coco/images/val' / name).read_bytes())
    (folder / 'corrupt.jpg').write_bytes(b'\xff\xd8 no image')
    (folder / 'notes.txt').write_text('no image either')
    with pytest.raises(SystemExit, match='cannot read .*corrupt.jpg'):
        load_tool('demo/image_demo').main([
            str(folder), str(DETECTOR), str(checkpoint), '--out-dir', str(tmp_path / 'demo'),
            '--score-thr', '0.0', '--device', 'cpu', *data_options(scenes)])
    assert sorted(file.name for file in (tmp_path / 'demo').iterdir()) == [
        '000001.jpg', '000002.jpg']


# ------------------------------------------------------------------------------ other libraries


def test_segmentation(scenes: Path, tmp_path: Path) -> None:
    pytest.importorskip('mmseg', reason='mmsegmentation is not installed')
    config = TINY / 'upernet.py'
    options = ['--cfg-options', *(f'{loader}_dataloader.dataset.data_root={scenes}/ade/'
                                  for loader in ('train', 'val', 'test'))]
    output = run_command('python', TOOLS / 'train.py', config, '--work-dir', tmp_path / 'work',
                         *options)
    assert re.search(r'Iter\(train\) +\[2/2\]', output) and 'mIoU' in output
    (log,) = (tmp_path / 'work').glob('*/*.log')
    for text in ('System environment:', 'Config:\n', 'Hooks will be executed', 'paramwise_options'):
        assert text in log.read_text() and text not in output
    assert output.count('\n') < 60, output  # 577 before
    checkpoint = tmp_path / 'work/iter_2.pth'
    # in this process, so the visualizer needs a name that no other run of it has used
    metrics = load_tool('test').main([
        str(config), str(checkpoint), '--work-dir', str(tmp_path / 'test'), '--show-dir',
        str(tmp_path / 'shown'), *options, f'visualizer.name={tmp_path.name}'])
    assert 0 <= metrics['mIoU'] <= 100
    assert len(list((tmp_path / 'shown').rglob('*.png'))) == 6
    image = scenes / 'ade/images/validation/000001.jpg'
    load_tool('demo/image_demo').main([
        str(image), str(config), str(checkpoint), '--out-dir', str(tmp_path / 'demo'),
        '--device', 'cpu', *options])
    assert cv2.imread(str(tmp_path / 'demo/000001.jpg')).shape[:2] == (64, 64)
    (tmp_path / 'small').mkdir()
    cv2.imwrite(str(tmp_path / 'small/one.png'), np.full((1, 1, 3), 99, np.uint8))
    Image.new('P', (9, 9)).save(tmp_path / 'small/two.gif')
    with pytest.raises(SystemExit, match='two.gif: it is a GIF file, which OpenCV does not read'):
        load_tool('demo/image_demo').main([
            str(tmp_path / 'small'), str(config), str(checkpoint), '--out-dir',
            str(tmp_path / 'demo'), '--device', 'cpu', *options])
    assert cv2.imread(str(tmp_path / 'demo/one.png')).shape[:2] == (32, 32)


def test_a_config_of_mmdet3d_is_checked(tmp_path: Path) -> None:
    pytest.importorskip('mmdet3d', reason='mmdet3d is not installed')
    config = tmp_path / 'fcos3d.py'
    config.write_text("_base_ = 'mmdet3d::fcos3d/"
                      "fcos3d_r101-caffe-dcn_fpn_head-gn_8xb2-1x_nus-mono3d.py'\n"
                      "model = dict(backbone=dict(init_cfg=None))\n")
    with pytest.raises(SystemExit, match='train_dataloader.dataset.ann_file: the annotation file '
                                         'data/nuscenes/nuscenes_infos_train.pkl does not exist'):
        load_tool('train').main([str(config), '--work-dir', str(tmp_path / 'work')])


def test_scripts_explain_their_arguments() -> None:
    for name in ('dist_train', 'dist_test', 'slurm_train', 'slurm_test'):
        done = subprocess.run(['bash', str(TOOLS / f'{name}.sh')], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith('usage: bash '), name


@pytest.mark.parametrize('name', ['train', 'test'])
def test_slurm_gets_the_processes_and_the_arguments(name: str, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for `srun` that prints what it is given, one word per line."""
    (tmp_path / 'srun').write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / 'srun').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')
    monkeypatch.setenv('GPUS', '4')
    script = TOOLS / f'slurm_{name}.sh'
    words = run_command('bash', script, 'part', 'job', 'a b.py', 'last', '--out', 'x.pkl')
    words = words.splitlines()
    assert words[:5] == ['-p', 'part', '--job-name=job', '--ntasks=4', '--cpus-per-task=5']
    assert {'--gres=gpu:4', '--ntasks-per-node=4'} <= set(words)
    middle = ['--work-dir', 'last'] if name == 'train' else ['last']
    assert words[words.index(f'{TOOLS}/{name}.py'):] == [
        f'{TOOLS}/{name}.py', 'a b.py', *middle, '--launcher', 'slurm', '--out', 'x.pkl']
    monkeypatch.setenv('GPUS_PER_NODE', '0')
    assert 'gpu' not in run_command('bash', script, 'part', 'job', 'a.py', 'last')
