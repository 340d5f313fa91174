# For one GPU: the full-size backbone, from scratch like the mini network.
_base_ = ['../_base_/methods/upernet_camvid.py', '../_base_/models/flash-intern-image_t.py']

model = dict(
    backbone=dict(
        _delete_=True,  # the Swin Transformer of the base
        **dict(_base_.flash_intern_image, init_cfg=None),
        drop_path_rate=0.1),
    decode_head=dict(in_channels=_base_.widths, channels=256),
    auxiliary_head=dict(in_channels=_base_.widths[2], channels=256))
train_dataloader = dict(batch_size=8, num_workers=4)
auto_scale_lr = dict(base_batch_size=8)

max_iters = 4000
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=500)
optim_wrapper = dict(optimizer=dict(lr=5e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='PolyLR', by_epoch=False, begin=0, end=max_iters, power=0.9, eta_min=1e-5),
]
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=500, max_keep_ckpts=2))
