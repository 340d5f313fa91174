_base_ = [
    '../_base_/methods/semantic-fpn_40k_ade20k-512x512.py', '../_base_/models/dat-pp_t.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.dat,
        drop_path_rate=0.4,
        with_cp=True),
    neck=dict(in_channels=_base_.widths))
