# Mask R-CNN on one map of stride 16, with the pyramid of ViTDet (arXiv:2203.16527).
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py', '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-layer-decay_3x.py', '../_base_/det-runtime.py',
    '../_base_/models/vit-dcnv4_b.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.vit,
        drop_path_rate=0.1,
        with_cp=True),
    neck=dict(
        _delete_=True,  # the FPN of the base
        type='SimpleFPN',
        in_channels=768,
        out_channels=256,
        num_outs=5))

# the decay of ViTDet-B; 12 layers are read from the backbone
optim_wrapper = dict(
    optimizer=dict(weight_decay=0.1), paramwise_cfg=dict(layer_decay_rate=0.7))
