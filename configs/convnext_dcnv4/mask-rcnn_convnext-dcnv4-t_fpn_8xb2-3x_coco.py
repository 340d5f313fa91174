# mmdet's Mask R-CNN with ConvNeXt-T, and DCNv4 in the backbone.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py', '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-convnext-decay_3x.py', '../_base_/det-runtime.py',
    '../_base_/models/convnext-dcnv4_t.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.convnext,
        drop_path_rate=0.4),
    neck=dict(in_channels=_base_.widths))
