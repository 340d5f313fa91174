# For one GPU: the full-size backbone at the size of the images, from scratch like the mini network.
_base_ = ['../_base_/methods/retinanet_bccd.py', '../_base_/models/flash-intern-image_t.py']

width = 256  # of the neck and of the head
model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **dict(_base_.flash_intern_image, init_cfg=None),
        drop_path_rate=0.1,
        out_indices=(1, 2, 3)),
    neck=dict(in_channels=_base_.widths[1:], out_channels=width),
    # twice the anchors, for cells of twice the size
    bbox_head=dict(in_channels=width, feat_channels=width,
                   anchor_generator=dict(octave_base_scale=4)))
resize = dict(type='Resize', scale=(640, 480), keep_ratio=True)
train_dataloader = dict(num_workers=4, dataset=dict(pipeline=[
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    resize,
    dict(type='RandomFlip', prob=[0.25, 0.25, 0.25],
         direction=['horizontal', 'vertical', 'diagonal']),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackDetInputs'),
]))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    resize,
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs',
         meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
optim_wrapper = dict(optimizer=dict(lr=2e-4))
