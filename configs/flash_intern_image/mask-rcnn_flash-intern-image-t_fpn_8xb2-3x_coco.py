_base_ = [
    '../_base_/models/mask-rcnn_fpn-ln.py',
    '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-layer-decay_3x.py', '../_base_/det-runtime.py',
    '../_base_/models/flash-intern-image_t.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.flash_intern_image,
        drop_path_rate=0.2,
        with_cp=True),
    neck=dict(in_channels=_base_.widths))
