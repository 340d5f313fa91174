# ImageNet-1K from scratch in mmpretrain, as the Dynamic Mobile-Former paper trains: batches of five
# image sizes, no mixup or cutmix. Mixed precision was on (--amp).
_base_ = './image-classifier_300e_in1k.py'

model = dict(
    backbone=dict(type='DynamicMobileFormer', class_features=True, out_indices=(),
                  drop_path_rate=0.1, norm_cfg=dict(type='SyncBN')),
    head=dict(
        _delete_=True,  # one linear layer
        type='StackedLinearClsHead',
        num_classes=1000,
        act_cfg=dict(type='HSwish'),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
    train_cfg=None)

train_pipeline = _base_.train_pipeline
# mmpretrain's RandomResizedCrop to 224, or to the size of the batch
train_pipeline[1] = dict(type='AtBatchSize', transform=train_pipeline[1])
train_dataloader = dict(
    batch_sampler=dict(type='MultiScaleBatchSampler', sizes=(160, 192, 224, 256, 320)),
    dataset=dict(pipeline=train_pipeline))

max_epochs = 470
train_cfg = dict(max_epochs=max_epochs)
# The paper does not give the rate; 6e-3 for 4096 images is the default of the released program.
optim_wrapper = dict(optimizer=dict(lr=1.5e-3))
param_scheduler = [
    dict(
        type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=20,
        convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=0, end=max_epochs,
        convert_to_iter_based=True),
]
custom_hooks = [
    dict(type='TemperatureAnnealingHook', start=30.0, end=1.0, epochs=10),
    # a decay of 0.9995, of the statistics of the batch norms as well; the averaged weights are
    # evaluated, and each checkpoint holds both
    dict(type='EMAHook', momentum=5e-4, update_buffers=True, priority='ABOVE_NORMAL'),
]
