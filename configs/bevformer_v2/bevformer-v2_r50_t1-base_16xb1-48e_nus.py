_base_ = ['./bevformer-v2_r50_t1-base_16xb1-24e_nus.py']

param_scheduler = [
    dict(type='LinearLR', start_factor=1 / 3, by_epoch=False, begin=0, end=2000),
    dict(type='MultiStepLR', by_epoch=True, begin=0, end=48, milestones=[44], gamma=0.1)
]
train_cfg = dict(max_epochs=48)
