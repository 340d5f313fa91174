# mmdet's Cascade Mask R-CNN recipe of ConvNeXt; the backbone comes from the leaf.
_base_ = [
    '../models/cascade-mask-rcnn_4conv1fc_fpn.py', '../datasets/coco-instance_ms-crop.py',
    '../schedules/adamw-convnext-decay_3x.py', '../det-runtime.py'
]

optim_wrapper = dict(optimizer=dict(lr=2e-4), paramwise_cfg=dict(decay_rate=0.7))
