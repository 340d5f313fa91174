# FlashInternImage or InternImage on ImageNet-1K from scratch. The published runs used mixed
# precision (--amp).
_base_ = './image-classifier_300e_in1k.py'

model = dict(
    backbone=dict(type='FlashInternImage', out_indices=(3, )),
    neck=dict(type='ConvHeadNeck'))

test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='ResizeEdge',
        scale=224,  # mmpretrain: 256, that is a crop ratio of 0.875 instead of 1
        edge='short',
        backend='pillow',
        interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader

# A decay of 0.9999, of the statistics of the batch norm as well; the averaged weights are
# evaluated, and each checkpoint holds both.
custom_hooks = [
    dict(type='EMAHook', momentum=1e-4, update_buffers=True, priority='ABOVE_NORMAL')
]
