# 36 epochs with the layer-wise learning rates of mmdet's ConvNeXt recipes, warm-up of 1000
# iterations. Those train in mixed precision (--amp).
_base_ = './adamw-layer-decay_3x.py'

optim_wrapper = dict(
    constructor='LearningRateDecayOptimizerConstructor',  # of mmdet
    paramwise_cfg=dict(
        _delete_=True,  # the settings of this package's constructor
        decay_rate=0.95,
        decay_type='layer_wise',
        num_layers=6))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type='MultiStepLR', begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1),
]
