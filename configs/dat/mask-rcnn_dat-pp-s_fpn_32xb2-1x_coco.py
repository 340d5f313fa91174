_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py',
    '../_base_/datasets/coco-instance_ms-crop.py',
    '../_base_/schedules/adamw-no-decay_1x.py', '../_base_/det-runtime.py',
    '../_base_/models/dat-pp_s.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.dat,
        drop_path_rate=0.1,
        with_cp=True),
    neck=dict(
        in_channels=_base_.widths,
        # the fifth level is a strided convolution of the last map instead of a max-pooling
        start_level=0,
        add_extra_convs='on_input'))
