# mmseg's Semantic FPN for ADE20K with AdamW, 40k iterations of 32 images, as PVT and DAT++ train
# it.
_base_ = [
    'mmseg::_base_/models/fpn_r50.py', '../datasets/ade20k-512x512.py',
    'mmseg::_base_/schedules/schedule_40k.py', '../seg-runtime.py'
]

model = dict(
    pretrained=None,
    data_preprocessor=dict(size=_base_.crop_size),
    decode_head=dict(num_classes=150))

optim_wrapper = dict(
    _delete_=True,  # SGD of the base
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-4, weight_decay=1e-4))
param_scheduler = [
    dict(type='PolyLR', power=0.9, eta_min=0.0, by_epoch=False, begin=0, end=40000),
]
# The learning rate is for 8 GPUs x 4 images.
train_dataloader = dict(batch_size=4)
auto_scale_lr = dict(enable=False, base_batch_size=32)
default_hooks = dict(checkpoint=dict(save_best='mIoU', max_keep_ckpts=2))  # mmseg: keeps all
