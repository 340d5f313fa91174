# 160k iterations, evaluation every 16k, with AdamW.
_base_ = 'mmseg::_base_/schedules/schedule_160k.py'

optim_wrapper = dict(
    _delete_=True,  # SGD of the base
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.05),
    # The depths are read from the backbone. At a rate of 1.0 the constructor still exempts norms
    # and biases from weight decay.
    constructor='CustomLayerDecayOptimizerConstructor',
    paramwise_cfg=dict(layer_decay_rate=1.0))
# The warm-up multiplies the decay, which begins at iteration 0; mmseg's own recipes begin it
# behind the warm-up. The decay is linear (power 1.0) and ends at zero.
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', power=1.0, eta_min=0.0, by_epoch=False, begin=0, end=160000),
]

# The learning rate is for 8 GPUs x 2 images.
auto_scale_lr = dict(enable=False, base_batch_size=16)
default_hooks = dict(checkpoint=dict(save_best='mIoU', max_keep_ckpts=2))  # mmseg: keeps all
