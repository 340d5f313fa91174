_base_ = [
    '../_base_/models/cascade-mask-rcnn_4conv1fc_fpn.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw-layer-decay_1x.py', '../_base_/det-runtime.py',
    '../_base_/models/intern-image_l.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.intern_image,
        drop_path_rate=0.4),
    neck=dict(in_channels=_base_.widths))

optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.94))
