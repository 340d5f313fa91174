# For one GPU: the full-size backbone, from scratch like the mini network, with larger crops.
_base_ = ['../_base_/methods/upernet_camvid.py', '../_base_/models/flash-intern-image_t.py']

crop_size = (320, 448)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=(480, 360), ratio_range=(0.7, 1.6), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.9,
         ignore_index=_base_.ignore_index),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        _delete_=True,  # the Swin Transformer of the base
        **dict(_base_.flash_intern_image, init_cfg=None),
        drop_path_rate=0.2),
    decode_head=dict(in_channels=_base_.widths, channels=256),
    auxiliary_head=dict(in_channels=_base_.widths[2], channels=256))
train_dataloader = dict(batch_size=16, num_workers=4, dataset=dict(pipeline=train_pipeline))
auto_scale_lr = dict(base_batch_size=16)
env_cfg = dict(cudnn_benchmark=True)  # all crops have one size

max_iters = 5000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=1000)
optim_wrapper = dict(optimizer=dict(lr=7e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=300),
    dict(type='PolyLR', by_epoch=False, begin=0, end=max_iters, power=0.9, eta_min=1e-5),
]
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1000, max_keep_ckpts=2))
