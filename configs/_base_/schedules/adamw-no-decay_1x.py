# 12 epochs, steps at 8 and 11, warm-up of 500 iterations (mmdet's 1x), with AdamW for 64 images.
_base_ = ['mmdet::_base_/schedules/schedule_1x.py', './adamw-no-decay.py']

optim_wrapper = dict(
    _delete_=True,  # SGD of the base
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=4e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=_base_.no_decay)

# The learning rate is for 32 GPUs x 2 images.
auto_scale_lr = dict(base_batch_size=64)
