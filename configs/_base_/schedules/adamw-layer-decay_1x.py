# 12 epochs, steps at 8 and 11, warm-up of 500 iterations (mmdet's 1x), with AdamW.
_base_ = 'mmdet::_base_/schedules/schedule_1x.py'

optim_wrapper = dict(
    _delete_=True,  # SGD of the base
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    # The depths are read from the backbone. At a rate of 1.0 the constructor still exempts norms
    # and biases from weight decay.
    constructor='CustomLayerDecayOptimizerConstructor',
    paramwise_cfg=dict(layer_decay_rate=1.0))

# The learning rate is for 8 GPUs x 2 images.
auto_scale_lr = dict(base_batch_size=16)
