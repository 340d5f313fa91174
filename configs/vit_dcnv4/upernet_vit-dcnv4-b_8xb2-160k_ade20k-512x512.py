# UperNet on four maps of one ViT, brought to strides 4, 8, 16 and 32 by mmseg's neck.
_base_ = [
    '../_base_/models/upernet.py', '../_base_/datasets/ade20k-512x512.py',
    '../_base_/schedules/adamw-layer-decay_160k.py', '../_base_/seg-runtime.py',
    '../_base_/models/vit-dcnv4_b.py'
]

model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        _delete_=True,  # the Swin Transformer of the base
        **_base_.vit,
        out_indices=(2, 5, 8, 11),
        drop_path_rate=0.1,
        with_cp=True),
    neck=dict(type='Feature2Pyramid', embed_dim=768, rescales=[4, 2, 1, 0.5]),
    decode_head=dict(in_channels=[768, 768, 768, 768]),
    auxiliary_head=dict(in_channels=768))

# 12 layers are read from the backbone
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=0.9))
