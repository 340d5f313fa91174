_base_ = [
    '../_base_/models/mask-rcnn_fpn-ln.py',
    '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-layer-decay_3x.py', '../_base_/det-runtime.py',
    '../_base_/models/flash-intern-image_b.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.flash_intern_image,
        drop_path_rate=0.4,
        with_cp=True),
    neck=dict(in_channels=_base_.widths))

# 16 GPUs x 4 images; the learning rate is the square-root rule's for batch 16 -> 64.
train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(base_batch_size=64)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4),
    paramwise_cfg=dict(layer_decay_rate=0.9, offset_lr_scale=0.01))
