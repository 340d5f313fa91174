# The baseline of FlashInternImage: DCNv3 layers, and mmdet's neck without norms.
_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw-layer-decay_1x.py', '../_base_/det-runtime.py',
    '../_base_/models/intern-image_b.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.intern_image,
        drop_path_rate=0.4),
    neck=dict(in_channels=_base_.widths))
