# The curve of adamw-layer-decay_160k.py with the optimiser of DAT++.
_base_ = ['./adamw-layer-decay_160k.py', './adamw-no-decay.py']

optim_wrapper = dict(
    _delete_=True,  # the layer-wise learning rates
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=6e-5, betas=(0.9, 0.999), weight_decay=0.01),
    paramwise_cfg=_base_.no_decay)
