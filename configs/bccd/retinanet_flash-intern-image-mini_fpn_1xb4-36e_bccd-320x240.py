# The backbone of the quick start.
_base_ = '../_base_/methods/retinanet_bccd.py'

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        type='FlashInternImage',
        channels=32,
        depths=(2, 2, 4, 2),
        groups=(2, 4, 8, 16),  # 16 channels per group, as in the published sizes
        drop_path_rate=0.0,
        out_indices=(1, 2, 3)),
    neck=dict(in_channels=[64, 128, 256]))
