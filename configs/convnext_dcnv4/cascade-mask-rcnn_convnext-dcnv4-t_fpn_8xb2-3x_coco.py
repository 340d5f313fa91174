_base_ = [
    '../_base_/methods/cascade-mask-rcnn_convnext_3x_coco.py',
    '../_base_/models/convnext-dcnv4_t.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.convnext,
        drop_path_rate=0.4),
    neck=dict(in_channels=_base_.widths))
