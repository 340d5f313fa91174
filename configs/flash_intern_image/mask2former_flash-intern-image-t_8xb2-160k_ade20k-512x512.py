_base_ = [
    '../_base_/methods/mask2former_160k_ade20k-512x512.py',
    '../_base_/models/flash-intern-image_t.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.flash_intern_image,
        drop_path_rate=0.2),
    decode_head=dict(in_channels=_base_.widths))

optim_wrapper = dict(
    clip_grad=dict(max_norm=0.01),
    paramwise_cfg=dict(layer_decay_rate=0.9))
