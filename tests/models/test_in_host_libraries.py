# Copyright (c) mmdcnv4 contributors.
# SPDX-License-Identifier: Apache-2.0
"""Our backbones inside unmodified configs of mmdet, mmsegmentation and mmdet3d.

A user's config names one of theirs as `_base_`, adds `custom_imports`, and overrides the backbone;
the widths that the parts behind it expect follow. Each runs in the library's own scope.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData

# small ones with the same widths; the parameters that learn only if the whole block does
BACKBONES = {
    'FlashInternImage': (
        """dict(_delete_=True, type='FlashInternImage', channels=16, depths=(1, 1, 2, 1),
                groups=(1, 2, 4, 8), drop_path_rate=0.1)""", '.dcn.offset_mask.weight'),
    'DAT': (
        """dict(_delete_=True, type='DAT', channels=16, blocks=('D', 'ND', 'D', 'D'),
                heads=(1, 2, 4, 8), groups=(1, 1, 2, 4), use_conv_stem=True, use_dwc_mlp=True,
                use_lpu=True, drop_path_rate=0.1)""", '.conv_offset.3.weight'),
    'DynamicMobileFormer': (
        """dict(_delete_=True, type='DynamicMobileFormer', stem_channels=(8, 16, 8),
                stages=(((16, 16, 2),), ((32, 32, 2),), ((64, 64, 4),), ((96, 128, 4),)),
                groups=2, num_tokens=3, token_channels=32, num_kernels=3)""",
        '.dw_conv.static_weight'),
}
BACKBONE = BACKBONES['FlashInternImage'][0]
MASK_RCNN = """
_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
custom_imports = dict(imports=['mmdcnv4'], allow_failed_imports=False)
model = dict(backbone={}, neck=dict(in_channels=[16, 32, 64, 128]))
"""
UPERNET = """
_base_ = 'mmseg::upernet/upernet_r50_4xb2-40k_cityscapes-512x1024.py'
custom_imports = dict(imports=['mmdcnv4'], allow_failed_imports=False)
model = dict(backbone={}, decode_head=dict(in_channels=[16, 32, 64, 128]),
             auxiliary_head=dict(in_channels=64))
"""
FCOS3D = f"""
_base_ = 'mmdet3d::fcos3d/fcos3d_r101-caffe-dcn_fpn_head-gn_8xb2-1x_nus-mono3d.py'
custom_imports = dict(imports=['mmdcnv4'], allow_failed_imports=False)
model = dict(backbone={BACKBONE}, neck=dict(in_channels=[16, 32, 64, 128]))
"""


@pytest.fixture
def scope(request):
    """The default scope of the library under test, taken back afterwards."""
    library = pytest.importorskip(request.param)
    pytest.importorskip(f'{request.param}.models')
    with DefaultScope.overwrite_default_scope(request.param):
        yield library


def build(tmp_path, text):
    path = tmp_path / 'config.py'
    path.write_text(text)
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(path).model)
    model.init_weights()
    assert type(model.backbone).__name__ in BACKBONES
    return revert_sync_batchnorm(model)


def assert_backbone_learns(model, losses):
    loss, _ = model.parse_losses(losses)
    assert torch.isfinite(loss)
    loss.backward()
    _, name = BACKBONES[type(model.backbone).__name__]
    # the offsets of DCNv4 start with zero masks behind them, the masks do not
    deep = {key: p for key, p in model.backbone.named_parameters() if key.endswith(name)}
    assert len({key.split('.')[1] for key in deep}) == 4  # one in every stage
    first = next(p for p in model.backbone.parameters() if p.dim() == 4)  # of the stem
    assert all(p.grad.any() for p in (first, *deep.values()))


@pytest.mark.parametrize('scope', ['mmdet'], indirect=True)
@pytest.mark.parametrize('backbone', [  # tests/configs/test_training.py trains it with the others
    name if name == 'FlashInternImage' else pytest.param(name, marks=pytest.mark.slow)
    for name in BACKBONES])
def test_mask_rcnn(tmp_path, scope, backbone):
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    model = build(tmp_path, MASK_RCNN.format(BACKBONES[backbone][0]))
    samples = []
    for _ in range(2):
        sample = DetDataSample(metainfo=dict(
            img_shape=(75, 110), ori_shape=(75, 110), pad_shape=(96, 128),
            batch_input_shape=(96, 128), scale_factor=(1.0, 1.0)))
        masks = np.zeros((1, 75, 110), np.uint8)
        masks[0, 10:50, 20:80] = 1
        sample.gt_instances = InstanceData(
            bboxes=torch.tensor([[20.0, 10.0, 80.0, 50.0]]), labels=torch.tensor([3]),
            masks=BitmapMasks(masks, 75, 110))
        samples.append(sample)
    data = dict(inputs=[torch.randint(0, 256, (3, 75, 110), dtype=torch.uint8)] * 2,
                data_samples=samples)
    batch = model.data_preprocessor(data, training=True)
    assert_backbone_learns(model, model(**batch, mode='loss'))
    model.eval()
    with torch.no_grad():
        results = model.test_step(dict(inputs=data['inputs'], data_samples=samples))
    assert len(results) == 2 and results[0].pred_instances.bboxes.shape[1] == 4


@pytest.mark.parametrize('scope', ['mmseg'], indirect=True)
@pytest.mark.parametrize('backbone', BACKBONES)
def test_upernet(tmp_path, scope, backbone):
    from mmseg.structures import SegDataSample
    # the config of mmseg names ResNet weights one level above the backbone
    with pytest.warns(UserWarning, match='open-mmlab://resnet50_v1c'):
        model = build(tmp_path, UPERNET.format(BACKBONES[backbone][0]))
    sample = SegDataSample(metainfo=dict(img_shape=(64, 96), ori_shape=(64, 96),
                                         pad_shape=(64, 96)))
    sample.gt_sem_seg = PixelData(data=torch.randint(0, 19, (1, 64, 96)))
    images = torch.randn(2, 3, 64, 96)
    assert_backbone_learns(model, model(images, [sample, sample], mode='loss'))
    model.eval()
    with torch.no_grad():
        results = model(images, [sample, sample], mode='predict')
    assert results[0].pred_sem_seg.data.shape == (1, 64, 96)


@pytest.mark.parametrize('scope', ['mmdet3d'], indirect=True)
def test_fcos3d(tmp_path, scope):
    from mmdet3d.structures import CameraInstance3DBoxes, Det3DDataSample
    model = build(tmp_path, FCOS3D)
    box = torch.tensor([[0.5, 1.0, 8.0, 4.0, 1.6, 1.8, 0.3, 0.1, 0.0]])
    sample = Det3DDataSample(metainfo=dict(
        img_shape=(64, 96), pad_shape=(64, 96), box_type_3d=CameraInstance3DBoxes,
        cam2img=[[80.0, 0.0, 48.0], [0.0, 80.0, 32.0], [0.0, 0.0, 1.0]], scale_factor=1.0))
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[20.0, 10.0, 80.0, 60.0]]), labels=torch.tensor([0]))
    sample.gt_instances_3d = InstanceData(
        bboxes_3d=CameraInstance3DBoxes(box, box_dim=9), labels_3d=torch.tensor([0]),
        centers_2d=torch.tensor([[50.0, 35.0]]), depths=torch.tensor([8.0]),
        attr_labels=torch.tensor([2]))
    inputs = dict(imgs=torch.randn(1, 3, 64, 96))
    assert_backbone_learns(model, model(inputs, [sample], mode='loss'))
    model.eval()
    with torch.no_grad():
        results = model(inputs, [sample], mode='predict')
    assert results[0].pred_instances_3d.bboxes_3d.tensor.shape[1] == 9
