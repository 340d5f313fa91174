# mmdet's RetinaNet on the maps of strides 8, 16, 32 of a DAT++; schedule and size to be set.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py', '../datasets/coco-detection_ms-crop.py',
    '../det-runtime.py'
]

model = dict(neck=dict(start_level=0))  # mmdet: 1, and four maps
