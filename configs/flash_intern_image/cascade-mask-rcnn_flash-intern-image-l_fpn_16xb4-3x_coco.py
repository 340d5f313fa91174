_base_ = [
    '../_base_/models/cascade-mask-rcnn_4conv1fc_fpn-ln.py',
    '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-layer-decay_3x_ema.py', '../_base_/det-runtime.py',
    '../_base_/models/flash-intern-image_l.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.flash_intern_image,
        drop_path_rate=0.4,
        with_cp=True),
    neck=dict(in_channels=_base_.widths))

# 16 GPUs x 4 images
train_dataloader = dict(batch_size=4)
optim_wrapper = dict(paramwise_cfg=dict(offset_lr_scale=0.01))
