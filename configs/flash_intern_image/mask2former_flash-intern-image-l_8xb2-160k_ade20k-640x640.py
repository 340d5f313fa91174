_base_ = [
    '../_base_/methods/mask2former_160k_ade20k-640x640.py',
    '../_base_/models/flash-intern-image_l.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.flash_intern_image,
        drop_path_rate=0.5,
        with_cp=True),
    decode_head=dict(in_channels=_base_.widths))

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.94))

train_cfg = dict(val_interval=2000)
default_hooks = dict(checkpoint=dict(interval=2000))
