_base_ = [
    '../_base_/methods/dino-4scale_12e_coco.py',
    '../_base_/models/intern-image_t.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.intern_image,
        out_indices=(1, 2, 3),
        drop_path_rate=0.2,
        with_cp=True),
    neck=dict(in_channels=_base_.widths[1:]))

# 8 GPUs x 2 images
train_dataloader = dict(batch_size=2)
auto_scale_lr = dict(base_batch_size=16)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
