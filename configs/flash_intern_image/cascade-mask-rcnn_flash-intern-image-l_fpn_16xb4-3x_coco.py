_base_ = [
    '../_base_/models/cascade-mask-rcnn_4conv1fc_fpn-ln.py',
    '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-layer-decay_3x.py', '../_base_/det-runtime.py',
    '../_base_/models/flash-intern-image_l.py'
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

# The averaged weights are those that are evaluated and saved.
custom_hooks = [
    dict(
        type='EMAHook',
        ema_type='ExpMomentumEMA',
        momentum=1e-4,  # after a start at 1; gamma iterations are the time constant between
        gamma=2000,
        update_buffers=True,
        priority=49)
]
