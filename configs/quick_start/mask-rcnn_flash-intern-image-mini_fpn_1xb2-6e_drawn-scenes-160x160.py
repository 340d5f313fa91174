# A small FlashInternImage Mask R-CNN, trained from scratch in minutes on two CPU cores.
# Data: tools/dataset_converters/drawn_scenes.py data/drawn_scenes
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/default_runtime.py',
          '../_base_/models/flash-intern-image_mini.py',
          '../_base_/datasets/drawn-scenes_instance.py', '../_base_/plugin.py']

num_classes = 5
width = 64  # of the neck and of the heads

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.flash_intern_image),
    neck=dict(
        in_channels=[32, 64, 128, 256], out_channels=width, num_outs=4,
        norm_cfg=dict(type='ChannelLN')),
    rpn_head=dict(
        in_channels=width, feat_channels=width,
        # objects are 28 to 90 pixels wide, and about as high
        anchor_generator=dict(scales=[5], ratios=[1.0], strides=[4, 8, 16, 32])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width, finest_scale=28,
                                roi_layer=dict(sampling_ratio=1)),
        # one box and one mask per object for all classes: each is trained by every object
        bbox_head=dict(in_channels=width, fc_out_channels=128, num_classes=num_classes,
                       reg_class_agnostic=True),
        # masks from the finest map for all objects
        mask_roi_extractor=dict(out_channels=width, roi_layer=dict(sampling_ratio=1)),
        mask_head=dict(num_convs=2, in_channels=width, conv_out_channels=width,
                       norm_cfg=dict(type='GN', num_groups=8), num_classes=num_classes,
                       class_agnostic=True)),
    # there are at most five objects per image, and masks are the dearest part of a step
    train_cfg=dict(
        rpn_proposal=dict(nms_pre=200, max_per_img=100),
        rcnn=dict(sampler=dict(num=16, pos_fraction=0.5))),
    test_cfg=dict(
        rpn=dict(nms_pre=200, max_per_img=50),
        # one object has one name
        rcnn=dict(max_per_img=20, nms=dict(class_agnostic=True))))

max_epochs = 6
train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=7e-4, weight_decay=0.05, fused=True),
    paramwise_cfg=dict(norm_decay_mult=0.0, bias_decay_mult=0.0),
    clip_grad=dict(max_norm=10.0, norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type='CosineAnnealingLR', by_epoch=True, begin=0, end=max_epochs, T_max=max_epochs,
         eta_min=1e-5, convert_to_iter_based=True),
]
auto_scale_lr = dict(enable=False, base_batch_size=2)

default_hooks = dict(
    logger=dict(interval=40),
    checkpoint=dict(max_keep_ckpts=2))
randomness = dict(seed=0)
