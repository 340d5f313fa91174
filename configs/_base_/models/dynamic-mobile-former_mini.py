# Dynamic Mobile-Former with the blocks of the published sizes, small enough for CPU cores and
# images of a few hundred pixels.
dynamic_mobile_former = dict(
    type='DynamicMobileFormer',
    stem_channels=(16, 32, 16),
    stages=(((64, 32, 2), (64, 32, 2)),
            ((128, 64, 2), (128, 64, 2)),
            ((256, 96, 4), (256, 96, 4)),
            ((384, 128, 4), (384, 128, 4))),
    groups=2,
    ffn_ratio=2.0,
    token_channels=96,
    num_kernels=4,
    drop_path_rate=0.0)
widths = [32, 64, 96, 128]  # of the feature maps at strides 4, 8, 16, 32
