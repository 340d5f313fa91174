# A UperNet for the street scenes of CamVid, trained from scratch; the backbone, its widths and the
# length of the training come from the leaf.
_base_ = ['mmseg::_base_/models/upernet_swin.py', 'mmseg::_base_/default_runtime.py',
          '../datasets/camvid.py', '../plugin.py']

num_classes = 11
width = 64  # of the heads
norm_cfg = dict(type='BN')  # one process: nothing to synchronise
# The square root of median frequency over frequency: a bicyclist covers a hundredth of the pixels
# of the road.
class_weight = [0.53, 0.45, 2.19, 0.39, 1.0, 0.65, 1.96, 1.4, 0.89, 2.52, 2.98]

model = dict(
    data_preprocessor=dict(size=_base_.crop_size, seg_pad_val=_base_.ignore_index,
                           test_cfg=dict(size_divisor=32)),
    pretrained=None,
    decode_head=dict(
        channels=width, norm_cfg=norm_cfg, num_classes=num_classes,
        ignore_index=_base_.ignore_index,
        loss_decode=dict(_delete_=True, type='WeightedCrossEntropy', class_weight=class_weight)),
    auxiliary_head=dict(
        channels=width, norm_cfg=norm_cfg, num_classes=num_classes,
        ignore_index=_base_.ignore_index,
        loss_decode=dict(_delete_=True, type='WeightedCrossEntropy', class_weight=class_weight,
                         loss_weight=0.4)))

val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(
        norm_decay_mult=0.0, bias_decay_mult=0.0,
        # docs/convergence.md
        custom_keys=dict(offset_mask=dict(lr_mult=0.1))),
    clip_grad=dict(max_norm=10.0, norm_type=2))
auto_scale_lr = dict(enable=False, base_batch_size=4)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=20, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'))
randomness = dict(seed=0)
