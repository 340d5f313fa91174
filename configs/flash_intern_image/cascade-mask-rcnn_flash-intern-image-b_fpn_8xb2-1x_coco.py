# Not in the paper, which has Cascade Mask R-CNN for L alone: its heads, with the settings of
# Mask R-CNN B.
_base_ = [
    '../_base_/models/cascade-mask-rcnn_4conv1fc_fpn-ln.py',
    'mmdet::_base_/datasets/coco_instance.py',
    '../_base_/schedules/adamw-layer-decay_1x.py', '../_base_/det-runtime.py',
    '../_base_/models/flash-intern-image_b.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.flash_intern_image,
        drop_path_rate=0.3,
        with_cp=True),
    neck=dict(in_channels=_base_.widths))
