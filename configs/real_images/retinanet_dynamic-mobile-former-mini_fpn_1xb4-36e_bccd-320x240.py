_base_ = ['../_base_/methods/retinanet_bccd.py', '../_base_/models/dynamic-mobile-former_mini.py']

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.dynamic_mobile_former,
        out_indices=(1, 2, 3)),
    neck=dict(in_channels=_base_.widths[1:]))

# A last batch of one image would have nothing to normalise in the kernel attention.
train_dataloader = dict(drop_last=True)
