# The backbone of the quick start.
_base_ = ['../_base_/methods/retinanet_bccd.py', '../_base_/models/flash-intern-image_mini.py']

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.flash_intern_image,
        out_indices=(1, 2, 3)),
    neck=dict(in_channels=[64, 128, 256]))
