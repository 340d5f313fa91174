_base_ = [
    '../_base_/methods/dino-4scale_12e_coco.py',
    '../_base_/models/flash-intern-image_l.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.flash_intern_image,
        out_indices=(1, 2, 3),
        drop_path_rate=0.4,
        with_cp=True),
    neck=dict(in_channels=_base_.widths[1:]))

# 8 GPUs x 2 images
train_dataloader = dict(batch_size=2)
auto_scale_lr = dict(base_batch_size=16)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    constructor='DefaultOptimWrapperConstructor',
    paramwise_cfg=dict(
        _delete_=True,  # the layer decay of T, S and B
        custom_keys=dict(backbone=dict(lr_mult=0.1))))
