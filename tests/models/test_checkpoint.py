# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Reading weights: every published layout, what does not fit, and files that mean harm."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import types

import pytest
import torch
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS, DefaultScope

from mmdcnv4.models import checkpoint as checkpoint_module
from mmdcnv4.models.backbones import FlashInternImage, InternImage

TINY = dict(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8))
HEAD = {'conv_head.0.weight': torch.zeros(4, 4, 1, 1), 'conv_head.1.0.running_mean': torch.zeros(4),
        'head.weight': torch.zeros(5, 4), 'head.bias': torch.zeros(5)}


def make_weights(seed=1, **options):
    """A state dict that differs from every start value."""
    generator = torch.Generator().manual_seed(seed)
    return {key: torch.randn(value.shape, generator=generator)
            for key, value in FlashInternImage(**TINY, **options).state_dict().items()}


def load(path, **options):
    model = FlashInternImage(**TINY, **options,
                             init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    model.init_weights()
    return model


def assert_equal(model, weights):
    state = model.state_dict()
    assert state.keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(state[key], value), key


def with_prefix(weights, prefix):
    return {prefix + key: value for key, value in weights.items()}


def test_a_file_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    weights = make_weights()
    torch.save(weights, tmp_path / 'x.pth')
    assert_equal(load('~/x.pth'), weights)


LAYOUTS = {
    'bare': lambda w: w,
    'state_dict': lambda w: dict(state_dict=w, meta=dict(epoch=12, classes=('a', 'b'))),
    'model': lambda w: dict(model={**w, **HEAD}, epoch=299, optimizer=dict(state={})),
    'ema before model': lambda w: dict(model={k: v + 1 for k, v in w.items()}, model_ema=w),
    'empty ema': lambda w: dict(model=w, model_ema=None),
    'module': lambda w: dict(model=with_prefix({**w, **HEAD}, 'module.')),
    'backbone': lambda w: dict(state_dict=with_prefix(w, 'backbone.')),
    'detector': lambda w: dict(state_dict={
        **with_prefix(w, 'module.backbone.'), 'module.neck.conv.weight': torch.zeros(3),
        'module.bbox_head.fc.weight': torch.zeros(3)}),
    'compiled': lambda w: with_prefix(w, '_orig_mod.'),
    'compiled inside': lambda w: dict(state_dict=with_prefix(w, 'module.backbone._orig_mod.')),
    'mmdet3d': lambda w: dict(state_dict={
        **with_prefix(w, 'img_backbone.'), 'img_neck.conv.weight': torch.zeros(3)}),
    'average alone': lambda w: dict(ema_state_dict={
        **with_prefix(w, 'module.backbone.'), 'steps': torch.zeros(())}),
    'state_dict before average': lambda w: dict(  # which mmengine swaps when it saves
        state_dict=with_prefix(w, 'backbone.'), ema_state_dict=with_prefix(
            {key: value + 1 for key, value in w.items()}, 'module.backbone.')),
    'semi-supervised': lambda w: dict(state_dict={
        **with_prefix({key: value + 1 for key, value in w.items()}, 'student.backbone.'),
        **with_prefix(w, 'teacher.backbone.'), 'teacher.neck.weight': torch.zeros(3)}),
    'distilled': lambda w: dict(teacher=with_prefix(w, 'backbone.'), student={}),
    'teacher': lambda w: with_prefix(w, 'teacher.'),
}


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts(tmp_path, layout):
    weights = make_weights()
    torch.save(LAYOUTS[layout](weights), tmp_path / 'file.pth')
    assert_equal(load(tmp_path / 'file.pth'), weights)


def test_prefix_argument(tmp_path):
    weights = make_weights()
    torch.save(dict(state_dict=with_prefix(weights, 'img_backbone.')), tmp_path / 'file.pth')
    model = FlashInternImage(**TINY, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'file.pth'), prefix='img_backbone'))
    model.init_weights()
    assert_equal(model, weights)


@pytest.mark.parametrize('extra', [dict(_scope_='mmdet'), dict(map_location='cpu'),
                                   dict(type=PretrainedInit)])
def test_other_spellings_of_init_cfg(tmp_path, extra):
    weights = make_weights()
    torch.save(weights, tmp_path / 'file.pth')
    init_cfg = dict(dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth')), **extra)
    model = FlashInternImage(**TINY, init_cfg=[dict(type='Constant', layer='Conv2d', val=9.0),
                                               init_cfg])
    model.init_weights()
    assert_equal(model, weights)


def test_misspelt_init_cfg(tmp_path):
    torch.save(make_weights(), tmp_path / 'file.pth')
    model = FlashInternImage(**TINY, init_cfg=dict(
        type='Pretrained', checkpoint=str(tmp_path / 'file.pth'), prefx='backbone'))
    with pytest.raises(ValueError, match='init_cfg .* must have checkpoint .*prefx'):
        model.init_weights()


def test_safetensors(tmp_path):
    path = tmp_path / 'file.safetensors'
    weights = make_weights()
    try:
        from safetensors.torch import save_file
    except ImportError:
        path.write_bytes(b'x')
        with pytest.raises(ImportError, match='pip install safetensors'):
            load(path)
    else:
        save_file(weights, path)
        assert_equal(load(path), weights)


def test_missing_layer_scale_keeps_its_start(tmp_path):
    weights = make_weights()
    torch.save(dict(model={**weights, **HEAD}), tmp_path / 'file.pth')
    model = load(tmp_path / 'file.pth', layer_scale=1.0)
    plain = load(tmp_path / 'file.pth')
    for key, value in model.state_dict().items():
        assert torch.equal(value, torch.ones_like(value) if 'gamma' in key else weights[key]), key
    image = torch.randn(1, 3, 32, 32)
    for out, expected in zip(model.eval()(image), plain.eval()(image)):
        torch.testing.assert_close(out, expected)


def test_layer_scale_of_some_blocks_only_is_an_error(tmp_path):
    weights = make_weights(layer_scale=1.0)
    del weights['levels.2.blocks.0.gamma1']
    torch.save(weights, tmp_path / 'file.pth')
    with pytest.raises(ValueError, match=r'missing 1 \(levels.2.blocks.0.gamma1\)'):
        load(tmp_path / 'file.pth', layer_scale=1.0)


def drop(weights):
    del weights['levels.1.blocks.0.dcn.value_proj.bias']


def add(weights):
    weights['levels.1.blocks.0.dcn.offset.weight'] = torch.zeros(1)


def reshape(weights):
    weights['patch_embed.conv1.weight'] = torch.zeros(8, 4, 3, 3)


@pytest.mark.parametrize('damage, message', [
    (drop, r'missing 1 \(levels.1.blocks.0.dcn.value_proj.bias\)'),
    (add, r'unexpected 1 \(levels.1.blocks.0.dcn.offset.weight\)'),
    (reshape, r'another shape 1 \(patch_embed.conv1.weight \(8, 4, 3, 3\), expected \(8, 3, 3')])
def test_what_does_not_fit_is_an_error(tmp_path, damage, message):
    weights = make_weights()
    damage(weights)
    torch.save(dict(model=weights), tmp_path / 'file.pth')
    with pytest.raises(ValueError, match=message):
        load(tmp_path / 'file.pth')


def test_layer_scale_in_the_file_alone_is_an_error(tmp_path):
    torch.save(make_weights(layer_scale=1.0), tmp_path / 'file.pth')
    with pytest.raises(ValueError, match=r'unexpected 8 \(levels.0.blocks.0.gamma1'):
        load(tmp_path / 'file.pth')


def test_file_of_another_model_names_its_prefixes(tmp_path):
    torch.save(dict(state_dict={'layer1.0.conv1.weight': torch.zeros(2), 'fc.bias': torch.ones(2)}),
               tmp_path / 'file.pth')
    with pytest.raises(ValueError, match=r'matches 0 of .* keys; its keys begin with 2 '
                                         r'\(fc, layer1\), expected 2 \(levels, patch_embed\)'):
        load(tmp_path / 'file.pth')


@pytest.mark.parametrize('content', [dict(epoch=3), [1, 2], torch.zeros(3), dict(model={})])
def test_file_without_weights(tmp_path, content):
    torch.save(content, tmp_path / 'file.pth')
    with pytest.raises(ValueError, match='must hold a state dict'):
        load(tmp_path / 'file.pth')


@pytest.mark.parametrize('content', [b'', b'404: Not Found', b'<html>', b'no pickle at all',
                                     b'PK\x03\x04 truncated'])
def test_damaged_file(tmp_path, content):
    (tmp_path / 'file.pth').write_bytes(content)
    with pytest.raises(ValueError, match='file.pth') as caught:
        load(tmp_path / 'file.pth')
    assert 'weights_only' not in str(caught.value)  # nobody is sent to the unsafe reader
    assert (repr(content) if content else 'is empty') in str(caught.value)


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('share', [0.02, 0.5, 0.95])
def test_cut_off_file(tmp_path, zipped, share):
    torch.save(dict(model=make_weights()), tmp_path / 'whole.pth',
               _use_new_zipfile_serialization=zipped)
    content = (tmp_path / 'whole.pth').read_bytes()
    (tmp_path / 'file.pth').write_bytes(content[:int(share * len(content))])
    with pytest.raises(ValueError, match='file.pth'):
        load(tmp_path / 'file.pth')


def test_absent_file_says_where_the_weights_are_and_how_to_do_without():
    with pytest.raises(FileNotFoundError) as caught:
        load('checkpoints/flash_intern_image_t_1k_224.pth')
    for part in ('flash_intern_image_t_1k_224.pth', 'OpenGVLab/DCNv4',
                 '--cfg-options model.backbone.init_cfg=None'):
        assert part in str(caught.value)
    with pytest.raises(FileNotFoundError) as caught:  # where nothing is trained
        checkpoint_module.read_file('absent.pth')
    assert str(caught.value).endswith("got 'absent.pth'")
    model = InternImage(channels=16, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8), init_cfg=dict(
        type='Pretrained', checkpoint='absent.pth'))
    with pytest.raises(FileNotFoundError, match='OpenGVLab/InternImage'):
        model.init_weights()


def test_urls_are_read_from_the_cache_of_torch(tmp_path, monkeypatch):
    """Each URL once, also where two end in the same name."""
    urls = [f'https://weights.invalid/{folder}/flash.pth?download=true' for folder in 'ab']
    weights, fetched = {url: make_weights(seed) for seed, url in enumerate(urls)}, []

    def download(url, path, progress):
        fetched.append(url)
        torch.save(dict(model=weights[url]), path)

    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', download)
    for url in urls * 2:
        assert_equal(load(url), weights[url])
    assert fetched == urls
    names = [path.name for path in (tmp_path / 'checkpoints').iterdir()]
    assert len(names) == 2 and all(
        name.startswith('flash-') and name.endswith('.pth') for name in names)


def test_url_that_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, 'get_dir', lambda: str(tmp_path))
    with socket.socket() as taken:  # bound, but nobody listens: the connection is refused
        taken.bind(('127.0.0.1', 0))
        url = f'http://127.0.0.1:{taken.getsockname()[1]}/flash.pth'
        with pytest.raises(OSError, match=rf'{url}: .*refused.* by hand'):
            load(url)


class Malicious:
    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.system, (f'touch {self.canary}',)


@pytest.mark.parametrize('zipped', [True, False])
def test_malicious_pickle_does_not_run(tmp_path, zipped):
    canary, path = tmp_path / 'canary', tmp_path / 'file.pth'
    torch.save(dict(model=make_weights(), config=Malicious(canary)), path,
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r'(posix|nt)\.system'):
        load(path)
    assert not canary.exists()
    torch.load(path, weights_only=False)  # the file is able to do harm
    assert canary.exists()


@pytest.fixture
def yacs(monkeypatch):
    """A stand-in for the package yacs, as the published classifiers pickle its `CfgNode`."""
    package, module = types.ModuleType('yacs'), types.ModuleType('yacs.config')

    class CfgNode(dict):
        def __init__(self, content):
            super().__init__(content)
            self.__dict__['__immutable__'] = True

    CfgNode.__module__, CfgNode.__qualname__ = 'yacs.config', 'CfgNode'
    package.config, module.CfgNode = module, CfgNode
    monkeypatch.setitem(sys.modules, 'yacs', package)
    monkeypatch.setitem(sys.modules, 'yacs.config', module)
    return CfgNode


@pytest.mark.skipif(not checkpoint_module._can_map_names(), reason='needs torch >= 2.6')
def test_settings_of_the_published_classifiers_stay_inert(tmp_path, yacs, monkeypatch):
    weights, path = make_weights(), tmp_path / 'file.pth'
    config = yacs(dict(MODEL=yacs(dict(NAME='t', DEPTHS=[4, 4, 18, 4])), LR=1e-3))
    torch.save(dict(model={**weights, **HEAD}, config=config, epoch=299,
                    args=argparse.Namespace(batch_size=8)), path)
    allowed = torch.serialization.get_safe_globals()
    monkeypatch.delitem(sys.modules, 'yacs.config')
    monkeypatch.delitem(sys.modules, 'yacs')
    assert_equal(load(path), weights)
    content = checkpoint_module.read_file(str(path))
    assert type(content['config']).__module__ == 'collections'
    assert not isinstance(content['args'], argparse.Namespace)
    # the allow-list ends with the call
    assert set(torch.serialization.get_safe_globals()) == set(allowed)  # in the order of a set


def test_settings_on_a_torch_that_cannot_map_names(tmp_path, yacs, monkeypatch):
    torch.save(dict(model=make_weights(), config=yacs(dict(LR=1e-3))), tmp_path / 'file.pth')
    monkeypatch.setattr(checkpoint_module, '_can_map_names', lambda: False)
    with pytest.raises(ValueError, match=r'yacs\.config\.CfgNode.*torch >= 2\.6'):
        load(tmp_path / 'file.pth')


@pytest.mark.skipif(not checkpoint_module._can_map_names(), reason='needs torch >= 2.6')
def test_training_checkpoint_of_mmengine(tmp_path):
    weights = make_weights()
    log = HistoryBuffer([1.0, 2.0], [1, 1])
    best = log.mean()  # a numpy scalar
    torch.save(dict(state_dict=with_prefix(weights, 'backbone.'), meta=dict(epoch=1),
                    message_hub=dict(log_scalars=dict(loss=log), runtime_info=dict(best=best))),
               tmp_path / 'epoch_1.pth')
    assert_equal(load(tmp_path / 'epoch_1.pth'), weights)


@pytest.mark.skipif(not hasattr(torch.serialization, 'get_safe_globals'), reason='torch < 2.5')
def test_weights_load_beside_another_allow_list(tmp_path):
    # as in tools/train.py, which lets torch read MMEngine's own types under the same names
    weights = make_weights()
    torch.save(dict(state_dict=weights, log=HistoryBuffer([1.0], [1])), tmp_path / 'epoch_1.pth')
    previous = torch.serialization.get_safe_globals()
    try:
        torch.serialization.add_safe_globals([(dict, 'builtins.getattr'), HistoryBuffer])
        allowed = torch.serialization.get_safe_globals()
        assert_equal(load(tmp_path / 'epoch_1.pth'), weights)
        assert set(torch.serialization.get_safe_globals()) == set(allowed)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(previous)


def build_detector(init_cfg, detector_init_cfg=None):
    pytest.importorskip('mmdet.models')
    detector = dict(
        type='mmdet.FCOS', init_cfg=detector_init_cfg,
        backbone=dict(type='FlashInternImage', **TINY, layer_scale=1.0, init_cfg=init_cfg),
        neck=dict(type='FPN', in_channels=[16, 32, 64, 128], out_channels=8, num_outs=5,
                  norm_cfg=dict(type='ChannelLN')),
        bbox_head=dict(type='FCOSHead', num_classes=3, in_channels=8, feat_channels=8,
                       stacked_convs=1, norm_cfg=None))
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(detector)


@pytest.mark.parametrize('detector_init_cfg', [
    None, dict(type='Normal', layer=['Linear', 'Conv2d'], std=0.7)])
def test_backbone_inside_a_detector(tmp_path, detector_init_cfg):
    weights = make_weights(layer_scale=1.0)
    torch.save(dict(model=weights), tmp_path / 'file.pth')
    model = build_detector(dict(type='Pretrained', checkpoint=str(tmp_path / 'file.pth')),
                           detector_init_cfg)
    model.init_weights()
    assert_equal(model.backbone, weights)
    assert model.backbone.is_init


def test_detector_from_scratch_starts_at_zero_offsets():
    model = build_detector(None, dict(type='Normal', layer=['Linear', 'Conv2d'], std=0.7))
    model.init_weights()
    for level in model.backbone.levels:
        assert not level.blocks[0].dcn.offset_mask.weight.any()
        assert level.blocks[0].mlp.fc1.weight.std() < 0.03


def test_report_in_the_log(tmp_path):
    weights = make_weights()
    torch.save(dict(model={**weights, **HEAD}), tmp_path / 'file.pth')
    logger = MMLogger.get_instance('checkpoint-test', log_file=str(tmp_path / 'log.txt'))
    previous = MMLogger._instance_dict.copy()
    try:
        load(tmp_path / 'file.pth', layer_scale=1.0)
    finally:
        MMLogger._instance_dict.clear()
        MMLogger._instance_dict.update(previous)
    for handler in logger.handlers:
        handler.flush()
    text = (tmp_path / 'log.txt').read_text()
    count = len(weights)
    assert f'{count} of {count + 8} tensors matched' in text
    assert '4 classifier tensors ignored' in text and '8 layer-scale tensors absent' in text
    assert 'missing 0' in text and 'unexpected 0' in text


def test_names_of_mmengine_are_known():
    """The list of inert names follows mmengine: a moved class would make its files unreadable."""
    assert f'{HistoryBuffer.__module__}.{HistoryBuffer.__qualname__}' in (
        checkpoint_module._INERT_OBJECTS)
