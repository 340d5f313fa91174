_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py', '../_base_/det-runtime.py',
    '../_base_/models/dynamic-mobile-former_s.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.dynamic_mobile_former),
    neck=dict(in_channels=_base_.widths))

# 8 GPUs x 2 images; the paper says 1e-4, the released settings 2e-4
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,  # SGD of the base
        type='AdamW', lr=2e-4, weight_decay=1e-4))

# A last batch of one image would have nothing to normalise in the kernel attention.
train_dataloader = dict(batch_sampler=dict(drop_last=True))
