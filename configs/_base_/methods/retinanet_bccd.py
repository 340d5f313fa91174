# A small RetinaNet for the cells of BCCD, trained from scratch in at most half an hour on two CPU
# cores; the backbone and its widths at strides 8, 16, 32 come from the leaf.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py', 'mmdet::_base_/default_runtime.py',
          '../datasets/bccd.py', '../plugin.py']

width = 64  # of the neck and of the head

model = dict(
    neck=dict(start_level=0, out_channels=width, num_outs=4, norm_cfg=dict(type='ChannelLN')),
    bbox_head=dict(
        num_classes=3, in_channels=width, feat_channels=width, stacked_convs=2,
        # mmdet starts the convolutions of the head at 0.01: without a norm a short training may
        # predict the average image for 36 epochs (seed 0 and 1)
        norm_cfg=dict(type='GN', num_groups=8),
        # platelets are about 18 pixels wide, white cells 100
        anchor_generator=dict(octave_base_scale=2, strides=[8, 16, 32, 64])),
    # cells touch, and there are up to 30 of them in an image
    test_cfg=dict(nms_pre=300, max_per_img=60))

max_epochs = 36
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=6)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=7e-4, weight_decay=0.05),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=10.0, norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, T_max=max_epochs,
         eta_min=1e-5, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=4)

default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=6, max_keep_ckpts=2))
randomness = dict(seed=0)
