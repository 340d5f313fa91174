# A small FlashInternImage UperNet, trained from scratch in minutes on two CPU cores.
# Data: tools/dataset_converters/drawn_scenes.py data/drawn_scenes
_base_ = ['mmseg::_base_/models/upernet_swin.py', 'mmseg::_base_/default_runtime.py',
          '../_base_/datasets/drawn-scenes_semantic.py', '../_base_/plugin.py']

num_classes = 6  # five shapes and the background
width = 64  # of the heads
norm_cfg = dict(type='BN')  # one process: nothing to synchronise
# The background covers five sixths of the pixels, and a disk more than twice as many as a star.
loss = dict(class_weight=[0.1, 0.4, 0.55, 0.65, 1.0, 1.0])

model = dict(
    data_preprocessor=dict(size=(160, 160)),
    pretrained=None,
    backbone=dict(
        _delete_=True,  # the Swin Transformer of the base
        type='FlashInternImage',
        channels=32,
        depths=(2, 2, 4, 2),
        groups=(2, 4, 8, 16),  # 16 channels per group, as in the published sizes
        drop_path_rate=0.0),
    # without the map of stride 4, on which most of the time of the head would be spent
    decode_head=dict(in_index=[1, 2, 3], in_channels=[64, 128, 256], channels=width,
                     norm_cfg=norm_cfg, num_classes=num_classes, loss_decode=loss),
    auxiliary_head=dict(in_channels=128, channels=width, norm_cfg=norm_cfg,
                        num_classes=num_classes, loss_decode=loss))

max_iters = 2000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=400)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0, bias_decay_mult=0.0,
        # Predictors of offsets and masks that learn at the full rate cost 4 points of mIoU:
        # docs/convergence.md.
        custom_keys=dict(offset_mask=dict(lr_mult=0.1))),
    clip_grad=dict(max_norm=10.0, norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=0, end=max_iters, eta_min=1e-5),
]
auto_scale_lr = dict(enable=False, base_batch_size=4)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=20, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=400, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))
randomness = dict(seed=0)
