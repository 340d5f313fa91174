_base_ = ['../_base_/methods/retinanet_dynamic-mobile-former_coco.py',
          '../_base_/models/dynamic-mobile-former_xxs.py']

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.dynamic_mobile_former),
    neck=dict(in_channels=_base_.widths))
