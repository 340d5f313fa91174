_base_ = [
    '../_base_/models/cascade-mask-rcnn_4conv1fc_fpn.py',
    '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-layer-decay_3x.py', '../_base_/det-runtime.py',
    '../_base_/models/intern-image_l.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.intern_image,
        drop_path_rate=0.4),
    neck=dict(in_channels=_base_.widths))

# 32 GPUs x 2 images; the learning rate is the square-root rule's for batch 16 -> 64. The published
# offset_lr_scale of 0.01 is left out: it has no effect on the names of DCNv3.
auto_scale_lr = dict(base_batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=2e-4), paramwise_cfg=dict(layer_decay_rate=0.9))

# The averaged weights are evaluated, and each checkpoint holds both.
custom_hooks = [
    dict(
        type='EMAHook',
        ema_type='ExpMomentumEMA',
        momentum=1e-4,  # after a start at 1; gamma iterations are the time constant between
        gamma=2000,
        update_buffers=True,
        priority=49)
]
