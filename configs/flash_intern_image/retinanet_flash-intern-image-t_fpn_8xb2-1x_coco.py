# A light detector that is not in the paper: mmdet's RetinaNet with the settings of Mask R-CNN T.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py', 'mmdet::_base_/datasets/coco_detection.py',
    '../_base_/schedules/adamw-layer-decay_1x.py', '../_base_/det-runtime.py',
    '../_base_/models/flash-intern-image_t.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.flash_intern_image,
        drop_path_rate=0.2,
        with_cp=True),
    neck=dict(in_channels=_base_.widths, norm_cfg=dict(type='ChannelLN')))
