# The baseline of FlashInternImage: DCNv3 layers, and mmdet's neck without norms.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py', '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-layer-decay_3x.py', '../_base_/det-runtime.py',
    '../_base_/models/intern-image_s.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.intern_image,
        drop_path_rate=0.3),
    neck=dict(in_channels=_base_.widths))
