# DCNv4 in place of the 3x3 convolutions of mmseg's U-Net, but for the first of the image: what the
# paper does in the residual blocks of a diffusion U-Net.
_base_ = [
    'mmseg::_base_/models/fcn_unet_s5-d16.py',
    # a U-Net wants maps that can be halved four times
    '../_base_/datasets/ade20k-512x512_multiple-of-32.py',
    '../_base_/schedules/adamw-layer-decay_160k.py', '../_base_/seg-runtime.py'
]

model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        _delete_=True,  # the plain U-Net, which is inside now
        type='with_dcnv4',
        module=_base_.model.backbone,
        replace=dict(
            match='*.convs.?.conv', targets=('conv3x3', ), cfg=dict(group_channels=32))),
    decode_head=dict(num_classes=150),
    auxiliary_head=dict(num_classes=150),
    test_cfg=dict(_delete_=True, mode='whole'))  # crops of 256

# a U-Net has no layers in the sense of the constructor of the base
optim_wrapper = dict(
    constructor='DefaultOptimWrapperConstructor',
    paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0))
