_base_ = [
    '../_base_/models/upernet.py', '../_base_/datasets/ade20k-896x896_multiple-of-32.py',
    '../_base_/schedules/adamw-layer-decay_160k.py', '../_base_/seg-runtime.py',
    '../_base_/models/intern-image_h.py'
]

model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(
        _delete_=True,  # the Swin Transformer of the base
        **_base_.intern_image,
        drop_path_rate=0.5),
    decode_head=dict(in_channels=_base_.widths),
    auxiliary_head=dict(in_channels=_base_.widths[2]))

# 16 GPUs x 1 image
optim_wrapper = dict(
    optimizer=dict(lr=2e-5),
    clip_grad=dict(max_norm=0.1, norm_type=2),
    paramwise_cfg=dict(layer_decay_rate=0.95))
