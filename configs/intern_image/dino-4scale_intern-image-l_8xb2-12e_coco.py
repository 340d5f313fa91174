_base_ = [
    '../_base_/methods/dino-4scale_12e_coco.py',
    '../_base_/models/intern-image_l.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.intern_image,
        out_indices=(1, 2, 3),
        drop_path_rate=0.4),
    neck=dict(in_channels=_base_.widths[1:]))

# 8 GPUs x 2 images
train_dataloader = dict(batch_size=2)
auto_scale_lr = dict(base_batch_size=16)
# One of the two published ways to slow the backbone; the other is a layer decay of 0.9 with a
# weight decay of 1e-4, as for T.
optim_wrapper = dict(
    optimizer=dict(lr=1e-4, weight_decay=0.05),
    constructor='DefaultOptimWrapperConstructor',
    paramwise_cfg=dict(
        _delete_=True,  # the layer decay of T
        custom_keys=dict(backbone=dict(lr_mult=0.1))))
