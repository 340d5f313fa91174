# mmdet's DINO with four scales, as the FlashInternImage recipes of T, S and B train it.
_base_ = [
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', '../plugin.py'
]

model = dict(
    data_preprocessor=dict(pad_size_divisor=32),  # mmdet: 1
    neck=dict(num_outs=4))

resize = dict(
    type='RandomChoiceResize',
    scales=[(short, 1333) for short in range(480, 801, 32)],
    keep_ratio=True)
train_pipeline = [
    dict(type='LoadImageFromFile', backend_args=_base_.backend_args),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(
        type='RandomChoice',
        transforms=[
            [resize],
            [
                dict(
                    type='RandomChoiceResize',
                    scales=[(400, 4200), (500, 4200), (600, 4200)],
                    keep_ratio=True),
                dict(
                    type='RandomCrop',
                    crop_type='absolute_range',
                    crop_size=(384, 600),
                    allow_negative_crop=False),  # mmdet: True
                resize,
            ],
        ]),
    dict(type='PackDetInputs'),
]
# 8 GPUs x 4 images
train_dataloader = dict(
    batch_size=4,
    dataset=dict(
        filter_cfg=dict(filter_empty_gt=True),  # mmdet: False
        pipeline=train_pipeline))
auto_scale_lr = dict(base_batch_size=32)

optim_wrapper = dict(
    optimizer=dict(lr=2e-4),
    # The depths are read from the backbone. As in the published recipe `level_embed` learns at
    # the rate of the stem.
    constructor='CustomLayerDecayOptimizerConstructor',
    paramwise_cfg=dict(
        _delete_=True,  # the backbone at a tenth of the rate
        layer_decay_rate=0.9))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),  # mmdet: none
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=12, milestones=[11], gamma=0.1),
]
# The recipe keeps 1, but MMEngine deletes it before the next one is written: a kill loses both.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best='auto'))
