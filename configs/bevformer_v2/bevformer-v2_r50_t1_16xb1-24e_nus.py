# Eleven groups of queries, image scales and flips, and rotation, scale and flips of the plane.
_base_ = './bevformer-v2_r50_t1-base_16xb1-24e_nus.py'

model = dict(bev_head=dict(num_groups=11))
train_pipeline = [
    _base_.load, _base_.load_boxes,
    dict(
        type='BEVAugment',
        rotation=0.3926990816987241,  # 22.5 degrees
        scale=(0.95, 1.05),
        flip_x_prob=0.5,
        flip_y_prob=0.5), *_base_.filter_boxes,
    dict(
        type='MultiViewCropResize',
        crop=_base_.crop,
        heights=(512, 544, 576, 608, 640, 672, 704, 736, 768),
        img_flip_prob=0.5), _base_.photometric,
    dict(type='ClipToUint8'),
    dict(type='MonoTargets'), _base_.pack
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
