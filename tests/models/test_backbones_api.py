# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""What every registered backbone has to do: one list of small models, one set of rules.

A new backbone is an entry of `CASES`.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from mmengine.registry import MODELS
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

import mmdcnv4.registration  # noqa: F401  registers the classes
from mmdcnv4.errors import InvalidType, InvalidValue
from mmdcnv4.models import backbones


class Case(NamedTuple):
    """A small model of a registered type.

    Attributes:
        type: its registered name.
        options: of a model with random depth off, so that two passes agree.
        widths: channels of the four maps.
        floors: whether a layer of stride 2 drops an odd row; else it maps n to ceil(n / 2).
        patch: side of a patch where all maps have that stride, 0 elsewhere.
        freezes_stem: whether `frozen_stages` includes the stem.
    """

    type: str
    options: dict[str, Any]
    widths: tuple[int, ...]
    floors: bool = False
    patch: int = 0
    freezes_stem: bool = True

    def build(self, seed=0, **options):
        """The model, with the same weights each time, and no branch that starts at zero."""
        torch.manual_seed(seed)
        model = MODELS.build(dict(type=self.type, **{**self.options, **options}))
        model.init_weights()
        with torch.no_grad():
            for parameter in model.parameters():
                if not parameter.any():
                    parameter.normal_(std=0.1)
        return model

    def sizes(self, length):
        """Rows of the four maps of an image with `length` rows."""
        if self.patch:
            return [-(-length // self.patch)] * 4
        if self.floors:
            first = max(length // 4, 1)
            return [max(first // 2**stage, 1) for stage in range(4)]
        return [-(-length // 2**(stage + 2)) for stage in range(4)]


_FLASH = dict(channels=16, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8), drop_path_rate=0.0)
_DAT = dict(channels=16, heads=(1, 2, 4, 8), groups=(1, 1, 2, 4), img_size=64, drop_path_rate=0.0)
_CONVNEXT = dict(arch=dict(depths=(1, 1, 2, 1), channels=(16, 32, 48, 64)), group_channels=16,
                 layer_scale_init_value=1.0)
_VIT = dict(arch=dict(embed_dims=32, num_layers=4, num_heads=2, feedforward_channels=64),
            img_size=(32, 40), patch_size=8, group_channels=16, out_indices=(0, 1, 2, 3))
CASES = {
    'FlashInternImage': Case('FlashInternImage', _FLASH, (16, 32, 64, 128)),
    'InternImage': Case('InternImage', dict(_FLASH, dw_kernel_size=3), (16, 32, 64, 128)),
    'DynamicMobileFormer': Case(
        'DynamicMobileFormer', dict(
            stem_channels=(8, 12, 8), stages=(((16, 12, 2),), ((20, 16, 2),),
                                              ((32, 20, 4), (24, 20, 2)), ((40, 24, 4),)),
            groups=2, num_tokens=3, token_channels=32, num_kernels=3, drop_path_rate=0.0),
        (12, 16, 20, 24), freezes_stem=False),
    'DAT++': Case('DAT', dict(_DAT, blocks=('D', 'N', 'ND', 'D'), use_conv_stem=True,
                              use_dwc_mlp=True, use_lpu=True), (16, 32, 64, 128)),
    'DAT': Case('DAT', dict(_DAT, blocks=('L', 'S', 'LD', 'D'), strides=(1, 1, 1, 1), window_size=3,
                            ref_mode='v1', offset_range_factor=2.0), (16, 32, 64, 128),
                floors=True),
    'ConvNeXtDCNv4': Case('ConvNeXtDCNv4', _CONVNEXT, (16, 32, 48, 64), floors=True),
    # DCNv4 in two stages, with all its options
    'ConvNeXtDCNv4, options': Case('ConvNeXtDCNv4', dict(
        _CONVNEXT, stage_with_dcn=(False, True, False, True), with_pointwise=True, kernel_size=5,
        dw_kernel_size=3, mask_init='center'), (16, 32, 48, 64), floors=True),
    'ViTDCNv4': Case('ViTDCNv4', dict(_VIT, layer_with_dcn=(0, 2, 3)), (32,) * 4, patch=8),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def loss_of(outs):
    return sum(out.float().square().mean() for out in outs)


def gradients(model, images):
    model.zero_grad()
    loss_of(model(images)).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_close(outs, expected, tolerance=1e-4):
    torch.testing.assert_close(outs, expected, rtol=tolerance, atol=tolerance)


def test_every_backbone_has_a_case():
    assert {entry.type for entry in CASES.values()} == set(backbones.__all__)


@pytest.mark.parametrize('size', [(1, 1), (33, 65), (64, 96), (5, 130)])
def test_shapes_and_memory_order(case, size):
    model = case.build().eval()
    images = torch.randn(3, 3, *size)
    channels_last = images.to(memory_format=torch.channels_last)
    with torch.no_grad():
        outs = model(images)
        batches = {count: model(images[:count]) for count in (0, 1)}
        assert_close(model(channels_last), outs)
        single = model(images[2:])
    places = list(zip(case.widths, *map(case.sizes, size)))
    for count, maps in ((3, outs), *batches.items()):
        assert isinstance(maps, tuple)
        assert [tuple(out.shape) for out in maps] == [(count, *place) for place in places]
        assert all(out.is_contiguous() and torch.isfinite(out).all() for out in maps)
    # an image does not see the others
    assert_close(batches[1], tuple(out[:1] for out in outs))
    assert_close(single, tuple(out[2:] for out in outs))


def test_shapes_without_memory(case):
    """On the meta device, as tools that count do."""
    with torch.device('meta'):
        model = MODELS.build(dict(type=case.type, **case.options))
        outs = model(torch.zeros(2, 3, 70, 100))
    assert [tuple(out.shape[1:]) for out in outs] == list(
        zip(case.widths, case.sizes(70), case.sizes(100)))


def test_a_training_step_without_images(case):
    for gradient in gradients(case.build().eval(), torch.randn(0, 3, 64, 64)).values():
        assert gradient.nan_to_num().abs().max() == 0


@pytest.mark.parametrize('out_indices', [(0,), (1, 3), [2]])
def test_out_indices(case, out_indices):
    images = torch.randn(1, 3, 64, 64)
    every = case.build().eval()
    chosen = case.build(out_indices=out_indices).eval()
    chosen.load_state_dict(every.state_dict(), strict=False)
    outs = chosen(images)
    assert_close(outs, tuple(every(images)[index] for index in out_indices))
    loss_of(outs).backward()  # what cannot have a gradient is frozen
    assert [name for name, p in chosen.named_parameters()
            if p.requires_grad != (p.grad is not None)] == []


@pytest.mark.parametrize('frozen_stages', [0, 2, 4])
def test_frozen_stages(case, frozen_stages):
    model = case.build(frozen_stages=frozen_stages, drop_path_rate=0.5).train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    first = case.build().train()
    assert not [name for name, p in first.named_parameters() if not p.requires_grad]
    assert len(frozen) < len(list(model.parameters())) or frozen_stages == 4
    assert bool(frozen) == (case.freezes_stem or frozen_stages > 0)
    before = copy.deepcopy(model.state_dict())
    outs = model(torch.randn(2, 3, 64, 64))
    if case.freezes_stem:
        assert [out.requires_grad for out in outs] == [
            stage >= frozen_stages for stage in range(4)]
    if any(out.requires_grad for out in outs):
        loss_of(outs).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (name in frozen), name
    # nor do running statistics of frozen stages change
    modules = [module for root in model._frozen_modules() for module in root.modules()]
    assert not any(module.training for module in modules)
    after = model.state_dict()
    names = {id(tensor): name for name, tensor in model.state_dict(keep_vars=True).items()}
    for module in modules:
        for buffer in module.buffers(recurse=False):
            if id(buffer) in names:
                assert torch.equal(after[names[id(buffer)]], before[names[id(buffer)]])


def test_recomputation_changes_nothing(case):
    images = torch.randn(2, 3, 40, 56)
    plain, recomputed = (
        gradients(case.build(with_cp=with_cp).train(), images) for with_cp in (False, True))
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert_close(recomputed[name], gradient)


def test_autocast(case):
    model = case.build().eval()
    images = torch.randn(2, 3, 64, 96)
    expected = model(images)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outs = model(images)
    loss_of(outs).backward()
    for out, reference in zip(outs, expected):  # bfloat16 has 8 bits
        assert (out.float() - reference).norm() < 0.1 * reference.norm()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize('name', [
    pytest.param(name, marks=[pytest.mark.slow] * (name in ('DAT', 'DynamicMobileFormer')))
    for name in CASES])
def test_compile(name):
    """Without a break of the graph, forward and backward; the two that take longest are slow."""
    torch._dynamo.reset()
    model = CASES[name].build().eval()
    images = torch.randn(1, 3, 48, 64)
    compiled = torch.compile(model, backend='aot_eager', fullgraph=True)
    expected, outs = model(images), compiled(images)
    assert_close(outs, expected)
    graph, plain = (torch.autograd.grad(loss_of(maps), list(model.parameters()))
                    for maps in (outs, expected))
    assert_close(graph, plain)


def test_export(case):
    model = case.build().eval()
    images = torch.randn(1, 3, 48, 64)
    with torch.no_grad():
        exported = torch.export.export(model, (images,)).module()
        assert_close(tuple(exported(images)), model(images))


@pytest.fixture
def process_group(tmp_path):
    distributed.init_process_group('gloo', init_method=f'file://{tmp_path}/store', rank=0,
                                   world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize('options', [{}, dict(out_indices=(1, 2)), dict(frozen_stages=1)],
                         ids=lambda options: next(iter(options), 'plain'))
def test_distributed_training_finds_every_gradient(case, options, process_group):
    """DistributedDataParallel stops in the second step if a parameter had no gradient."""
    model = DistributedDataParallel(case.build(**options).train())
    for _ in range(2):
        model.zero_grad()
        loss_of(model(torch.randn(2, 3, 64, 64))).backward()


def test_copies(case):
    model = case.build().eval()
    images = torch.randn(1, 3, 32, 32)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
        assert_close(twin(images), case.build().eval()(images))


@pytest.mark.parametrize('options, text', [
    (dict(out_indices=(0, 4)), 'out_indices'), (dict(frozen_stages=5), 'frozen_stages'),
    (dict(in_channels=0), 'in_channels'), (dict(pretrained='weights.pth'), 'pretrained'),
    (dict(drop_path_rate=1.0), 'drop_path_rate')])
def test_bad_arguments_are_named(case, options, text):
    with pytest.raises(InvalidValue, match=f'{text} must be'):
        case.build(**options)


def test_unknown_arguments_are_refused(case):
    with pytest.raises(InvalidType, match='num_classes'):
        case.build(num_classes=1000)


@pytest.mark.parametrize('shape', [(3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32)])
def test_bad_images_are_refused(case, shape):
    with pytest.raises(ValueError, match=r'\(N, 3, H, W\)'):
        case.build()(torch.zeros(shape))
