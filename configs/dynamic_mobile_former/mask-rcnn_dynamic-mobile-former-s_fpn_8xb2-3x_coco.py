_base_ = ['./mask-rcnn_dynamic-mobile-former-s_fpn_8xb2-1x_coco.py']

# The paper says a weight decay of 1e-4, the released settings 0.05.
optim_wrapper = dict(optimizer=dict(lr=1e-4, weight_decay=0.05))
# The published runs repeat the data three times in each of 12 epochs, with steps at 9 and 11.
max_epochs = 36
train_cfg = dict(max_epochs=max_epochs, val_interval=3)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[27, 33],
         gamma=0.1),
]
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=_base_.backend_args),
    dict(type='LoadAnnotations', with_bbox=True, with_mask=True, poly2mask=False),
    dict(type='RandomResize', scale=[(1333, 640), (1333, 800)], keep_ratio=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
