_base_ = [
    '../_base_/methods/mask2former_160k_ade20k-640x640.py',
    '../_base_/models/flash-intern-image_b.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.flash_intern_image,
        drop_path_rate=0.4),
    decode_head=dict(in_channels=_base_.widths))
