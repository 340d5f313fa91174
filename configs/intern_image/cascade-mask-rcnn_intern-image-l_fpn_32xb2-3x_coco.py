_base_ = [
    '../_base_/models/cascade-mask-rcnn_4conv1fc_fpn.py',
    '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-layer-decay_3x_ema.py', '../_base_/det-runtime.py',
    '../_base_/models/intern-image_l.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.intern_image,
        drop_path_rate=0.4),
    neck=dict(in_channels=_base_.widths))

# 32 GPUs x 2 images. The published offset_lr_scale of 0.01 is left out: it has no effect on the
# names of DCNv3.
