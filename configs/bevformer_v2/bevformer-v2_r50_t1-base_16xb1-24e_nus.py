_base_ = [
    '_base_/bevformer-v2_r50.py', '_base_/nus-temporal.py', '_base_/schedule-24e.py',
    'mmdet3d::_base_/default_runtime.py', '_base_/plugin.py'
]

default_hooks = dict(checkpoint=dict(interval=1, max_keep_ckpts=2))
# classes of the dataset and of both heads must be as many
custom_hooks = [dict(type='mmdet.NumClassCheckHook')]
