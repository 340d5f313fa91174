# Fine-tuning of ImageNet-22K weights at 384 x 384: FlashInternImage-L, InternImage-L and XL. The
# released file asks for single precision, its command line for mixed precision; which of the two
# the published run had is not known.
_base_ = './image-classifier_300e_in1k-224x224.py'

model = dict(
    head=dict(loss=dict(label_smooth_val=0.3)),
    train_cfg=None)  # neither Mixup nor CutMix

train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='RandomResizedCrop', scale=384, backend='pillow', interpolation='bicubic'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(
        type='RandAugment',
        policies='timm_increasing',
        num_policies=2,
        total_level=10,
        magnitude_level=9,
        magnitude_std=0.5,
        hparams=dict(
            pad_val=[round(value) for value in _base_.bgr_mean], interpolation='bicubic')),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='ResizeEdge', scale=384, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=384),
    dict(type='PackInputs'),
]
# 16 GPUs x 32 images
train_dataloader = dict(batch_size=32, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=32, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
auto_scale_lr = dict(base_batch_size=512)

# The published run counts layers from the last block, with factor 1; the constructor gives that
# block 0.9, and the stem another 0.9 than the first block. The multipliers make up for both. Every
# name with `offset` learns at a tenth, the convolution before the predictor as well.
optim_wrapper = dict(
    optimizer=dict(lr=2e-5),
    constructor='CustomLayerDecayOptimizerConstructor',
    paramwise_cfg=dict(
        _delete_=True,  # the decay multipliers of the base, which the constructor has built in
        layer_decay_rate=0.9,
        custom_keys={
            'backbone': dict(lr_mult=1 / 0.9),
            '.dcn.offset': dict(lr_mult=0.1 / 0.9),
            'backbone.patch_embed': dict(lr_mult=1 / 0.9**2)
        }))
train_cfg = dict(max_epochs=20)
param_scheduler = [
    dict(
        type='LinearLR', start_factor=1e-6, by_epoch=True, begin=0, end=2,
        convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR', eta_min=0., by_epoch=True, begin=0, end=20,
        convert_to_iter_based=True),
]
