# ImageNet-1K from scratch in mmpretrain, with the data and the schedule of its Swin Transformer,
# for 1024 images; backbone, neck and width of the head to be set. timm's colour jitter of 0.4 has
# no effect when RandAugment is used and is left out.
_base_ = [
    'mmpretrain::_base_/datasets/imagenet_bs64_swin_224.py',
    'mmpretrain::_base_/schedules/imagenet_bs1024_adamw_swin.py',
    'mmpretrain::_base_/default_runtime.py', '../plugin.py'
]

model = dict(
    type='ImageClassifier',
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        init_cfg=dict(type='TruncNormal', layer='Linear', std=0.02, bias=0.),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original')),
    train_cfg=dict(augments=[
        dict(type='Mixup', alpha=0.8),
        dict(type='CutMix', alpha=1.0)
    ]))

# 8 GPUs x 128 images; the learning rate of the base is for 1024
train_dataloader = dict(batch_size=128)
val_dataloader = dict(batch_size=128)
test_dataloader = val_dataloader

optim_wrapper = dict(clip_grad=dict(max_norm=5.0))
# Values for 1024 images; both parts change with every iteration. As in the published programs the
# cosine counts from the first iteration; the warm-up multiplies its beginning.
param_scheduler = [
    dict(
        type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=20,
        convert_to_iter_based=True),
    dict(
        type='CosineAnnealingLR', eta_min=1e-5, by_epoch=True, begin=0, end=300,
        convert_to_iter_based=True),
]
# The newest two and the best; mmpretrain keeps all, which are 300 here.
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best='auto'))
