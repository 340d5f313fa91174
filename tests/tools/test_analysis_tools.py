# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Counting, timing and looking at models."""

from __future__ import annotations

import json
import re
import sys

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch import nn

from helpers.tool_runner import REPOSITORY, TINY, load_tool
from mmdcnv4.cli.analysis import ModelPart, flop_analyzer
from mmdcnv4.errors import UserError
from mmdcnv4.models.backbones import FlashInternImage, InternImage
from mmdcnv4.models.layers import ConvHeadNeck
from mmdcnv4.ops import DCNv4, _extension

needs_kernels = pytest.mark.skipif(not _extension.is_available,
                                   reason='a trace names the operator only when it is compiled')
UPERNET = TINY / 'upernet.py'
MASK_RCNN = TINY / 'mask_rcnn.py'
SMALL = dict(channels=8, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), drop_path_rate=0.0)


class Classifier(nn.Module):
    """The published classifiers."""

    def __init__(self, arch):
        super().__init__()
        self.backbone = FlashInternImage(arch, out_indices=(3,), drop_path_rate=0.0)
        width = self.backbone.channels
        self.neck, self.head = ConvHeadNeck(8 * width, 12 * width), nn.Linear(12 * width, 1000)

    def forward(self, x):
        return self.head(self.neck(self.backbone(x))[0])


def count(model, *inputs):
    with torch.no_grad():
        return flop_analyzer(model.eval(), inputs).by_operator()


@needs_kernels
@pytest.mark.parametrize('arch, expected', [
    ('t', 4.87), ('s', 8.31), pytest.param('b', 16.20, marks=pytest.mark.slow),
    pytest.param('l', 36.7, marks=pytest.mark.slow)])
def test_multiply_adds_of_the_published_classifiers(arch, expected):
    found = count(Classifier(arch), torch.zeros(1, 3, 224, 224))
    total = sum(found[name] for name in ('conv', 'linear', 'dcnv4')) / 1e9
    assert total == pytest.approx(expected, abs=0.05 if arch == 'l' else 0.005)


@needs_kernels
@pytest.mark.parametrize('options, points, size', [
    (dict(), 9, (6, 5)), (dict(kernel_size=5, pad=2, remove_center=True), 24, (6, 5)),
    (dict(kernel_size=(1, 3), pad=(0, 1), stride=2), 3, (3, 3))])
def test_multiply_adds_of_a_layer(options, points, size):
    layer = DCNv4(32, group=2, **options)
    found = count(layer, torch.zeros(2, 6, 5, 32))
    assert found['dcnv4'] == 5 * points * 32 * size[0] * size[1] * 2


@needs_kernels
def test_get_flops(capsys):
    tool = load_tool('analysis_tools/get_flops')
    tool.main([str(UPERNET), '--shape', '64', '96', '--part', 'backbone'])
    out = capsys.readouterr().out
    model = FlashInternImage(**SMALL)
    parameters = sum(p.numel() for p in model.parameters())
    found = count(model, torch.zeros(1, 3, 64, 96))
    assert f'backbone at 64 x 96: {parameters:,} parameters' in out
    line = re.search(r'dcnv4 +([\d.]+) G', out)
    assert float(line[1]) == pytest.approx(found['dcnv4'] / 1e9, abs=6e-4)
    for config in (UPERNET, MASK_RCNN):
        whole = tool.count(Config.fromfile(config), 64, 64)
        features = tool.count(Config.fromfile(config), 64, 64, 'backbone')
        assert whole.total > features.total > 0
    for shape in (['1', '2', '3'], ['0']):
        with pytest.raises(SystemExit):
            tool.main([str(UPERNET), '--shape', *shape])
        assert 'must be one or two positive numbers, got' in capsys.readouterr().err


@needs_kernels
def test_get_flops_of_an_image_that_is_too_small_for_the_head(capsys):
    tool = load_tool('analysis_tools/get_flops')
    with pytest.raises(SystemExit) as caught:
        tool.main([str(MASK_RCNN), '--shape', '1'])
    assert re.search(r'^error: the model fails on an image of 1 x 1 .*larger --shape',
                     str(caught.value))
    tool.main([str(MASK_RCNN), '--shape', '1', '--part', 'backbone'])
    assert 'backbone at 1 x 1' in capsys.readouterr().out


def test_model_with_a_head_that_asks_for_samples():
    """Mask2Former, which mmseg's own `mode='tensor'` calls without them."""
    cfg = Config.fromfile(REPOSITORY / 'configs' / 'flash_intern_image' /
                          'mask2former_flash-intern-image-t_8xb2-160k_ade20k-512x512.py')
    cfg.model.backbone.update(SMALL, arch=None)
    cfg.model.decode_head.update(in_channels=[8, 16, 32, 64], num_queries=5)
    with torch.no_grad():
        classes, masks = ModelPart(cfg).eval()(torch.zeros(1, 3, 64, 64))
    assert classes[-1].shape == (1, 5, 151) and masks[-1].shape == (1, 5, 16, 16)


@pytest.mark.parametrize('options, words', [
    ([], 'model, forward, float32'), (['--amp', '--part', 'features'], 'features, forward, bfloat'),
    (['--amp', 'bfloat16', '--part', 'backbone'], 'backbone, forward, bfloat16'),
    (['--train', '--batch', '2', '--part', 'backbone'], 'backbone, forward+backward, float32')])
def test_benchmark(capsys, options, words):
    tool = load_tool('analysis_tools/benchmark')
    timing = tool.main([str(UPERNET), '--shape', '64', '--repeats', '3', '--warm-up', '1',
                        '--device', 'cpu', *options])
    out = capsys.readouterr().out
    assert words in out and 'images/s' in out
    assert 0 < timing.low <= timing.median <= timing.high
    assert timing.peak_bytes > 2**26  # Python and torch alone take more
    with pytest.raises(SystemExit):
        tool.main([str(UPERNET), '--repeats', '0'])


@pytest.mark.parametrize('config, folder', [(UPERNET, 'ade'), (MASK_RCNN, 'coco')])
def test_benchmark_of_the_training_loss(scenes, capsys, config, folder):
    tool = load_tool('analysis_tools/benchmark')
    command = [str(config), '--training-data', '--repeats', '2', '--warm-up', '0', '--device',
               'cpu', '--cfg-options', f'train_dataloader.dataset.data_root={scenes}/{folder}/']
    timing = tool.main(command)
    out = capsys.readouterr().out
    assert 'training loss, forward+backward, float32' in out and '\n2 x 64 x 64: ' in out
    assert 0 < timing.low <= timing.high
    with pytest.raises(SystemExit):
        tool.main([*command[:2], '--compile'])


def test_benchmark_measures_time(monkeypatch):
    tool = load_tool('analysis_tools/benchmark')
    clock = iter(range(100))  # a run takes one second per reading of the clock
    monkeypatch.setattr(tool.time, 'perf_counter', lambda: next(clock))
    calls = []
    timing = tool.measure(lambda: calls.append(1), torch.device('cpu'), repeats=4, warm_up=3)
    assert len(calls) == 7 and (timing.low, timing.median, timing.high) == (1, 1, 1)


def write_log(folder, *records):
    file = folder / 'run' / 'vis_data' / 'scalars.json'
    file.parent.mkdir(parents=True)
    file.write_text('\n'.join(map(json.dumps, records)))


def test_curves(tmp_path, capsys):
    """Training by iterations, and by epochs, where a validation logs the epoch as its step."""
    tool = load_tool('analysis_tools/plot_curves')
    write_log(tmp_path / 'a', dict(loss=2.0, step=20), dict(mIoU=10.0, step=25),
              dict(loss=1.0, step=40), dict(mIoU=30.0, step=50))
    write_log(tmp_path / 'b', dict(loss=4.0, step=20, epoch=1), dict(mIoU=20.0, step=1),
              dict(loss=3.0, step=40, epoch=2), dict(mIoU=25.0, step=2))
    expected = dict(a=[(25, 10.0), (50, 30.0)], b=[(20, 20.0), (40, 25.0)])
    for name, points in expected.items():
        log = tool.newest_log(tmp_path / name)
        assert tool.read_curve(log, 'mIoU') == (points, False)
        assert [step for step, _ in tool.read_curve(log, 'loss').points] == [20, 40]
        assert tool.read_curve(log, 'loss').is_training
    command = [str(tmp_path / 'a'), str(tmp_path / 'b'), '--out', str(tmp_path / 'out/c.png'),
               '--names', 'first', 'second', '--panel', 'loss', '--panel', 'mIoU']
    tool.main(command)
    assert 'second: mIoU 25 after 40 iterations' in capsys.readouterr().out
    assert cv2.imread(str(tmp_path / 'out/c.png')).std() > 10
    with pytest.raises(SystemExit):
        tool.main([*command, '--names', 'first'])
    with pytest.raises(SystemExit, match='has no entry AP'):
        tool.main([*command, '--panel', 'AP'])
    with pytest.raises(SystemExit, match='--out must end in .png'):
        tool.main([*command, '--out', str(tmp_path / 'c.foo')])
    with (tmp_path / 'a/run/vis_data/scalars.json').open('a') as stream:
        stream.write('\n{"loss"')
    with pytest.raises(SystemExit, match='one record per line'):
        tool.main(command)
    with pytest.raises(UserError, match='there is no .*scalars.json'):
        tool.newest_log(tmp_path / 'c')


def test_curves_of_several_seeds(tmp_path, capsys):
    tool = load_tool('analysis_tools/plot_curves')
    for name, last in dict(a0=30.0, a1=33.0, b=50.0).items():
        write_log(tmp_path / name, dict(loss=2.0, step=20), dict(mIoU=10.0, step=25),
                  dict(mIoU=last, step=50), *[dict(mIoU=1.0, step=60)] * (name == 'a1'))
    command = [*(str(tmp_path / name) for name in ('a0', 'b', 'a1')), '--names', 'A', 'B', 'A',
               '--panel', 'mIoU', '--out', str(tmp_path / 'c.png')]
    tool.main(command)
    assert capsys.readouterr().out.splitlines() == [
        'A: mIoU 31.5 (30 to 33, 2 runs) after 50 iterations', 'B: mIoU 50 after 50 iterations']
    tool.main([*command, '--at', '25', '50'])
    assert capsys.readouterr().out.startswith('A: mIoU 10 (10 to 10, 2 runs) after 25')
    with pytest.raises(SystemExit, match='A logged mIoU, got 60; the nearest is 50'):
        tool.main([*command, '--at', '60'])
    write_log(tmp_path / 'd', dict(loss=2.0, step=20), dict(mIoU=3.0, step=7))
    with pytest.raises(SystemExit, match='runs named A logged mIoU at no common iteration'):
        tool.main([str(tmp_path / 'd'), *command[:4], 'A', *command[4:]])


def test_recorded_samples_are_those_of_the_operator():
    """A layer whose offsets are constant: its samples stand where they must."""
    tool = load_tool('analysis_tools/visualize_offsets')
    model = FlashInternImage(**SMALL, offset_scale=2.0)
    layer = model.levels[1].blocks[0].dcn
    with torch.no_grad():
        bias = layer.offset_mask.bias[:54].view(2, 27)
        bias[1, 2 * 5], bias[1, 2 * 5 + 1], bias[1, 18 + 5] = 0.75, -0.5, 3.0
    samples = {item.name: item for item in tool.record(model, torch.randn(2, 3, 64, 96))}
    assert list(samples) == [f'levels.{i}.blocks.0.dcn' for i in range(4)]
    item = samples['levels.1.blocks.0.dcn']
    assert item.input_size == (8, 12) and item.offset.shape == (8, 12, 2, 9, 2)
    # tap 5 is (x, y) = (0, 1); the offset is scaled like the grid
    torch.testing.assert_close(item.positions(3, 4)[1, 5],
                               torch.tensor([4 + 2 * 0.75, 3 + 2 * (1 - 0.5)]))
    torch.testing.assert_close(item.positions(3, 4)[0, 0], torch.tensor([2.0, 1.0]))
    assert (item.mask[..., 1, 5] == 3).all() and (item.mask[..., 0, :] == 0).all()
    distances = item.distances()
    assert distances.max() == pytest.approx(np.hypot(1.5, 1.0)) and distances.min() == 0
    # of the grid scaled by 2: five taps of nine are two pixels to the right or below, in both
    # groups; with its offset tap 5 of the second group is at (1.5, 1), no longer one of them
    assert item.far_share() == pytest.approx((5 + 4) / 18)
    assert item.far_share(3) == 0 and samples['levels.0.blocks.0.dcn'].far_share() == 5 / 9


def test_recorded_masks_of_dcnv3_are_normalised():
    tool = load_tool('analysis_tools/visualize_offsets')
    samples = tool.record(InternImage(**SMALL), torch.randn(1, 3, 32, 32))
    for item in samples:
        torch.testing.assert_close(item.mask, torch.full_like(item.mask, 1 / 9))


def test_visualize_offsets(tmp_path, capsys):
    tool = load_tool('analysis_tools/visualize_offsets')
    model = ModelPart(Config.fromfile(UPERNET)).model
    torch.save(dict(state_dict=model.state_dict()), tmp_path / 'model.pth')
    cv2.imwrite(str(tmp_path / 'image.png'), np.full((40, 60, 3), 128, np.uint8))
    out = tmp_path / 'offsets.png'
    tool.main([str(UPERNET), str(tmp_path / 'model.pth'), str(tmp_path / 'image.png'),
               '--out', str(out), '--size', '96'])
    printed = capsys.readouterr().out
    assert printed.count('.dcn ') == 4 and printed.count(' 0.0 %') == 4
    assert cv2.imread(str(out)).std() > 10
    torch.save({'foo.bar': torch.zeros(2)}, tmp_path / 'foo.pth')
    with pytest.raises(SystemExit, match='foo.pth is not of this model'):
        tool.main([str(UPERNET), str(tmp_path / 'foo.pth'), str(tmp_path / 'image.png'),
                   '--out', str(out)])
    with pytest.raises(SystemExit, match='must be a picture'):
        tool.main([str(UPERNET), str(tmp_path / 'model.pth'), str(tmp_path / 'model.pth'),
                   '--out', str(out)])


def test_grid_of_a_kernel(tmp_path, capsys):
    tool = load_tool('analysis_tools/visualize_offsets')
    out = tmp_path / 'grid.png'
    tool.main(['--grid', 'kernel_size=3', 'offset_scale=2', '--out', str(out)])
    picture = cv2.imread(str(out)).astype(int)
    blue = (picture[..., 0] > picture[..., 2] + 80).astype(np.uint8)
    regions, _ = cv2.connectedComponents(cv2.morphologyEx(blue, cv2.MORPH_CLOSE, np.ones((9, 9))))
    assert regions - 1 == 9
    for option, words in (('group=3', 'group'), ('kernel_size=x', "kernel_size must be .* 'x'")):
        with pytest.raises(SystemExit, match=words):
            tool.main(['--grid', option, '--out', str(out)])
    with pytest.raises(SystemExit):
        tool.main(['--grid', 'kernel_size', '--out', str(out)])
    assert "argument --grid: must be KEY=VALUE, got 'kernel_size'" in capsys.readouterr().err


def test_image_as_the_config_prepares_it(tmp_path):
    tool = load_tool('analysis_tools/visualize_offsets')
    file = str(tmp_path / 'image.png')
    cv2.imwrite(file, np.full((20, 30, 3), (10, 20, 30), np.uint8))  # blue, green, red
    scaled = dict(bgr_to_rgb=True, mean=[1, 2, 3], std=[2, 2, 2])
    for options, expected in ((scaled, (14.5, 9, 3.5)), (dict(to_rgb=True), (30, 20, 10)),
                              (dict(), (10, 20, 30))):
        rgb, images = tool.prepare_image(file, None, options)
        assert rgb.shape == (20, 30, 3) and images.shape == (1, 3, 20, 30)
        assert rgb[0, 0].tolist() == [30, 20, 10] and tuple(images[0, :, 0, 0].tolist()) == expected
    assert tool.prepare_image(file, 60, {})[1].shape == (1, 3, 40, 60)


@pytest.mark.parametrize('name, options', [
    ('get_flops', []), ('benchmark', ['--device', 'cpu']),
    ('visualize_offsets', ['a.pth', 'a.png', '--out', 'a.png'])])
def test_errors_of_every_tool(tmp_path, monkeypatch, name, options):
    monkeypatch.chdir(tmp_path)
    tool = load_tool(f'analysis_tools/{name}')
    torch.save(dict(state_dict=dict(a=torch.zeros(1))), tmp_path / 'a.pth')
    (tmp_path / 'broken.py').write_text('a = 1 / 0')
    (tmp_path / 'other.py').write_text("model, default_scope = dict(type='A'), 'mmpretrain'")
    monkeypatch.setitem(sys.modules, 'mmpretrain', None)
    for config, words in (('absent.py', '^error: the config absent.py does not exist'),
                          ('broken.py', '^error: cannot read the config broken.py: ZeroDivision'),
                          ('other.py', 'needs mmpretrain, which is not installed')):
        if name == 'get_flops' and config == 'other.py' and not _extension.is_available:
            continue
        with pytest.raises(SystemExit, match=words):
            tool.main([config, *options])


def test_benchmark_errors():
    tool = load_tool('analysis_tools/benchmark')
    command = [str(MASK_RCNN), '--shape', '64', '--repeats', '1', '--warm-up', '0', '--device']
    with pytest.raises(RuntimeError, match='expected scalar type Float but found BFloat16'):
        tool.main([*command, 'cpu', '--amp'])  # mmcv's RoIAlign; a fault of no file keeps its type
    with pytest.raises(SystemExit, match='--device must be cpu, .*, got gpu'):
        tool.main([*command, 'gpu'])
    with pytest.raises(SystemExit, match=r'--device cuda:99: torch .* sees \d+ GPU'):
        tool.main([*command, 'cuda:99'])


def test_throughput(capsys, monkeypatch):
    """The models of one batch size take turns on the same images."""
    tool = load_tool('analysis_tools/throughput')
    assert set(tool.DEFAULT) <= set(tool.BACKBONES)
    names = ['ConvNeXt-T + DCNv4', 'FlashInternImage-T']
    rows = tool.main(['--models', *names, '--size', '32', '--batch', '1', '2', '--repeats', '1',
                      '--warm-up', '0', '--device', 'cpu'])
    assert [(row.name, row.batch) for row in rows] == [
        (name, batch) for batch in (1, 2) for name in names]
    assert all(row.low <= row.median <= row.high for row in rows)
    assert rows[3].images_per_second == 2 / rows[3].median
    assert rows[1].parameters == 28_651_776
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 2 + 4 and table[2].startswith('ConvNeXt-T + DCNv4')
    with pytest.raises(SystemExit):
        tool.parse_args(['--batch', '0'])
    modes = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, **options: modes.append(options))
    quick = ['--models', *names, '--size', '32', '--batch', '1', '--repeats', '1', '--warm-up', '0',
             '--device', 'cpu']
    tool.main([*quick, '--compile'])
    assert 'float32, compiled (default), cpu' in capsys.readouterr().out
    tool.main([*quick, '--compile', 'reduce-overhead'])
    assert [options['mode'] for options in modes] == 2 * ['default'] + 2 * ['reduce-overhead']
