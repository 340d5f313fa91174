# mmdet's RetinaNet with the 1x schedule of Dynamic Mobile-Former; the backbone comes from the leaf.
_base_ = [
    'mmdet::_base_/models/retinanet_r50_fpn.py', 'mmdet::_base_/datasets/coco_detection.py',
    'mmdet::_base_/schedules/schedule_1x.py', '../det-runtime.py'
]

# 8 GPUs x 2 images
optim_wrapper = dict(
    optimizer=dict(
        _delete_=True,  # SGD of the base
        type='AdamW', lr=1e-4, weight_decay=1e-4))

# A last batch of one image would have nothing to normalise in the kernel attention.
train_dataloader = dict(batch_sampler=dict(drop_last=True))
