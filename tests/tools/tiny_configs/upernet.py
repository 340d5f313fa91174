# The segmentation quick start with everything smaller, for tests.
_base_ = ['../../../configs/quick_start/'
          'upernet_flash-intern-image-mini_1xb4-2k_drawn-scenes-160x160.py']

model = dict(
    data_preprocessor=dict(size=(64, 64)),
    backbone=dict(channels=8, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8)),
    decode_head=dict(in_channels=[16, 32, 64], channels=8),
    auxiliary_head=dict(in_channels=32, channels=8))

train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(batch_size=1, num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=2))
