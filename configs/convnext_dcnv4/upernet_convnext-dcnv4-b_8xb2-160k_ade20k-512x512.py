# mmseg's UperNet with ConvNeXt-B, and DCNv4 in the backbone.
_base_ = [
    '../_base_/models/upernet.py', '../_base_/datasets/ade20k-512x512.py',
    '../_base_/schedules/adamw-layer-decay_160k.py', '../_base_/seg-runtime.py',
    '../_base_/models/convnext-dcnv4_b.py'
]

model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        _delete_=True,  # the Swin Transformer of the base
        **_base_.convnext,
        drop_path_rate=0.4),
    decode_head=dict(in_channels=_base_.widths),
    auxiliary_head=dict(in_channels=_base_.widths[2]))

# mmseg trains it in mixed precision (--amp)
optim_wrapper = dict(
    optimizer=dict(lr=1e-4),
    constructor='LearningRateDecayOptimizerConstructor',  # of mmseg
    paramwise_cfg=dict(
        _delete_=True,  # the settings of this package's constructor
        decay_rate=0.9,
        decay_type='stage_wise',
        num_layers=12))
