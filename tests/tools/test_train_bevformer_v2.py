# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""The tools on the mini config of BEVFormer v2: what it learns, two processes, kill and resume."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import signal
import socket
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from helpers.tool_runner import REPOSITORY, TOOLS, load_tool, run_command, start_tool
from mmdcnv4.cli import checkpoints

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ('mmdet3d', 'nuscenes')),
    reason='mmdet3d or the nuScenes devkit is not installed')
CONFIG = (REPOSITORY / 'configs' / 'bevformer_v2' /
          'bevformer-v2_flash-intern-image-mini_t2_1xb1-100e_synthetic-rig.py')
METRIC = 'NuScenes metric/pred_instances_3d_NuScenes'


def draw(root: Path, *options: str) -> Path:
    run_command('python', REPOSITORY / 'tools/dataset_converters/synthetic_rig.py', root, *options)
    return root


@pytest.fixture(scope='module')
def rig(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scenes of two key frames."""
    return draw(tmp_path_factory.mktemp('rig'))


def data_options(root: Path, **entries: object) -> list[str]:
    """`--cfg-options` that point the config at `root` and set more entries."""
    options = [f'{loader}_dataloader.dataset.data_root={root}/'
               for loader in ('train', 'val', 'test')]
    for name in ('val', 'test'):
        options += [f'{name}_evaluator.data_root={root}/',
                    f'{name}_evaluator.ann_file={root}/synthetic_infos.pkl']
    return ['--cfg-options', *options, *(f'{key}={value}' for key, value in entries.items())]


def records(work_dir: Path) -> list[dict]:
    """All that was logged, in order."""
    return [json.loads(line) for file in sorted(work_dir.glob('*/vis_data/scalars.json'))
            for line in file.read_text().splitlines()]


# --------------------------------------------------------------------------------- what it learns


@pytest.mark.slow
def test_the_mini_config_learns_its_samples(rig: Path, tmp_path: Path) -> None:
    run_command('python', TOOLS / 'train.py', CONFIG, '--work-dir', tmp_path, *data_options(rig))
    logged = records(tmp_path)
    losses = [record['loss'] for record in logged if 'loss' in record]
    assert losses[-1] < 0.2 * losses[0]
    mono = [sum(value for key, value in record.items() if key.startswith('mono_loss'))
            for record in logged if 'loss' in record]
    assert mono[-1] < 0.2 * mono[0]
    scores = next(record for record in reversed(logged) if f'{METRIC}/mAP' in record)
    at_two_metres = [value for key, value in scores.items() if key.endswith('_AP_dist_2.0')]
    assert len(at_two_metres) == 10 and sum(at_two_metres) / 10 > 0.9
    assert scores[f'{METRIC}/mATE'] < 0.3  # metres


def velocity_error(config: Config, checkpoint: Path) -> float:
    """Mean over the objects of the last key frames, in m/s."""
    from mmdet3d.registry import DATASETS, MODELS
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import DefaultScope
    from mmengine.runner import load_checkpoint

    import mmdcnv4.bevformer_v2  # noqa: F401
    checkpoints.allow_mmengine_checkpoints()
    with DefaultScope.overwrite_default_scope('mmdet3d'):
        model = MODELS.build(config.model).eval()
        dataset = DATASETS.build(config.train_dataloader.dataset)
    load_checkpoint(model, str(checkpoint), map_location='cpu')
    errors = []
    for index in (1, 3):
        sample = dataset[index]
        truth = sample['data_samples'].gt_instances_3d
        with torch.no_grad():
            found = model.test_step(pseudo_collate([sample]))[0].pred_instances_3d
        for box, label in zip(truth.bboxes_3d, truth.labels_3d):
            apart = (found.bboxes_3d.bev[:, :2] - box[:2]).norm(dim=1)
            best = int(((found.labels_3d == label) & (apart < 2)).int().argmax())  # by score
            assert found.labels_3d[best] == label and apart[best] < 2
            errors.append(float((found.bboxes_3d.tensor[best, 7:9] - box[7:9]).norm()))
    return sum(errors) / len(errors)


@pytest.mark.slow
def test_the_frame_before_tells_the_velocities(tmp_path: Path) -> None:
    """Two scenes whose last key frames look the same; in one of them everything moves backwards."""
    root = draw(tmp_path / 'twins', '--twins')
    errors = {}
    for frames in ((0,), (-1, 0)):
        config = Config.fromfile(CONFIG)
        config = Config.fromstring(
            config.pretty_text.replace('data/synthetic-rig/', f'{root}/'), '.py')
        config.merge_from_dict({
            'model.frames': frames, 'model.bev_head.train_cfg': dict(code_weights=[1.0] * 10),
            'train_dataloader.dataset.frames': frames, 'val_dataloader.dataset.frames': frames,
            'train_cfg.max_epochs': 140, 'train_cfg.val_interval': 1000,
            'param_scheduler.1.end': 560, 'default_hooks.checkpoint.interval': 140})
        if len(frames) == 1:
            config.model.temporal_fusion = None
        name = f'{len(frames)}-frames'
        config.dump(tmp_path / f'{name}.py')
        run_command('python', TOOLS / 'train.py', tmp_path / f'{name}.py', '--work-dir',
                    tmp_path / name)
        errors[frames] = velocity_error(config, tmp_path / name / 'epoch_140.pth')
    assert errors[-1, 0] < 0.5 * errors[0,], errors


# ------------------------------------------------------------------- two processes, kill and resume


def test_two_processes_on_the_cpu(rig: Path, tmp_path: Path,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        monkeypatch.setenv('PORT', str(server.getsockname()[1]))
    output = run_command(
        'bash', TOOLS / 'dist_train.sh', CONFIG, 2, '--work-dir', tmp_path,
        *data_options(rig, **{'train_cfg.max_epochs': 2, 'train_cfg.val_interval': 2,
                              'default_hooks.checkpoint.interval': 2,
                              'default_hooks.logger.interval': 1}))
    # 4 samples on 2 processes
    assert len(re.findall(r'Epoch\(train\) +\[2\]\[2/2\]', output)) == 1
    assert re.search(r'Epoch\(val\) +\[2\]\[2/2\]', output) and 'mATE' in output
    checkpoints.allow_mmengine_checkpoints()
    assert torch.load(tmp_path / 'epoch_2.pth', map_location='cpu')['meta']['iter'] == 4


def train_command(rig: Path, work_dir: Path) -> Sequence[object]:
    return ['train.py', CONFIG, '--work-dir', work_dir, *data_options(
        rig, **{'train_cfg.max_epochs': 3, 'train_cfg.val_interval': 10, 'randomness.seed': 5,
                'default_hooks.checkpoint.interval': 1, 'default_hooks.logger.interval': 1})]


@pytest.mark.slow  # three processes; test_train_and_test.py does the same with mmdet
def test_killed_run_resumes_to_the_same_weights(rig: Path, tmp_path: Path) -> None:
    whole = train_command(rig, tmp_path / 'whole')
    run_command('python', TOOLS / whole[0], *whole[1:])
    command = train_command(rig, tmp_path / 'killed')
    process = start_tool(*command)
    output = []
    for line in process.stdout:
        output.append(line)
        if re.search(r'Epoch\(train\) +\[2\]\[2/4\]', line):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait(60) == -signal.SIGKILL, ''.join(output)[-4000:]
    assert not (tmp_path / 'killed/epoch_2.pth').exists()
    assert 'resumed epoch: 1, iter: 4' in run_command('python', TOOLS / command[0], *command[1:],
                                                      '--resume')
    checkpoints.allow_mmengine_checkpoints()
    first, second = (torch.load(tmp_path / name / 'epoch_3.pth', map_location='cpu')
                     for name in ('whole', 'killed'))
    assert second['meta']['iter'] == 12
    for name, weight in first['state_dict'].items():
        torch.testing.assert_close(second['state_dict'][name], weight, msg=name)


# ---------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize('tool, entry', [('train', 'val'), ('test', 'test')])
@pytest.mark.parametrize('folder', ['maps', 'v1.0-mini'])
def test_metric_without_maps_or_tables(rig: Path, tmp_path: Path, tool: str, entry: str,
                                       folder: str) -> None:
    root = Path(shutil.copytree(rig, tmp_path / 'rig'))
    shutil.rmtree(root / folder)
    checkpoint = [tmp_path / 'model.pth'] if tool == 'test' else []
    torch.save({}, tmp_path / 'model.pth')
    with pytest.raises(SystemExit) as caught:
        load_tool(tool).main([str(CONFIG), *map(str, checkpoint), '--work-dir',
                              str(tmp_path / 'work'), *data_options(root)])
    assert str(caught.value.code).startswith(f'error: {entry}_evaluator.data_root: the metric')
    assert str(root / folder)[:-5] in str(caught.value.code)


@pytest.mark.parametrize('entries, message', [
    ({'train_dataloader.dataset.metainfo.classes': 'car'},
     "metainfo.classes must be a list of names out of .*, got 'car'"),
    ({'train_dataloader.dataset.frames': '[0]'},
     r'inputs must hold the frames \(-1, 0\) of the model, got 6 images of frames \(0,\)'),
    ({'train_dataloader.dataset.pipeline.4.crop': '[0,40,640,160]'},
     r'crop must be inside the image 320 x 160, got \(0, 40, 640, 160\)')])
def test_config_and_data_that_do_not_match(rig: Path, tmp_path: Path, entries: dict,
                                           message: str) -> None:
    options = data_options(rig, experiment_name=tmp_path.name, **entries)
    with pytest.raises(SystemExit) as caught:
        load_tool('train').main([str(CONFIG), '--work-dir', str(tmp_path), *options])
    assert re.search('error: .*' + message, str(caught.value.code))


def test_other_classes_than_the_head(rig: Path, tmp_path: Path) -> None:
    """mmdet3d's own assertion: no error of ours, so that it keeps its type and its words."""
    options = data_options(rig, experiment_name=tmp_path.name,
                           **{'train_dataloader.dataset.metainfo.classes': '[car]'})
    with pytest.raises(AssertionError, match=r'num_classes.*\(10\) in BEVFormerV2Head'):
        load_tool('train').main([str(CONFIG), '--work-dir', str(tmp_path), *options])
