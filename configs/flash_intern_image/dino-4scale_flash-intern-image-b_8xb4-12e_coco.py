_base_ = [
    '../_base_/methods/dino-4scale_12e_coco.py',
    '../_base_/models/flash-intern-image_b.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.flash_intern_image,
        out_indices=(1, 2, 3),
        drop_path_rate=0.3,
        with_cp=True),
    neck=dict(in_channels=_base_.widths[1:]))
