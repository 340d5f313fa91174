# The published numbers are of settings that were not released: those of DAT++ T are used.
_base_ = [
    '../_base_/models/cascade-mask-rcnn_4conv1fc_fpn.py',
    '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-no-decay_1x.py', '../_base_/det-runtime.py',
    '../_base_/models/dat_t.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.dat,
        drop_path_rate=0.0,
        with_cp=True),
    neck=dict(in_channels=_base_.widths))
