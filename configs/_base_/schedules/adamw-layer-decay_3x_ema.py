# 36 epochs for batches of 64 images, with averaged weights: Cascade Mask R-CNN of the largest
# sizes.
_base_ = './adamw-layer-decay_3x.py'

# the square-root rule's learning rate for batch 16 -> 64
auto_scale_lr = dict(base_batch_size=64)
optim_wrapper = dict(optimizer=dict(lr=2e-4), paramwise_cfg=dict(layer_decay_rate=0.9))

# The averaged weights are evaluated, and each checkpoint holds both.
custom_hooks = [
    dict(
        type='EMAHook',
        ema_type='ExpMomentumEMA',
        momentum=1e-4,  # after a start at 1; gamma iterations are the time constant between
        gamma=2000,
        update_buffers=True,
        priority=49)
]
