# DAT++ with the blocks of the published sizes, small enough for CPU cores and images of a few
# hundred pixels.
dat = dict(
    type='DAT',
    channels=32,
    blocks=('ND', 'ND', 'NDND', 'DD'),
    heads=(1, 2, 4, 8),  # 32 channels per head
    groups=(1, 1, 2, 4),
    use_conv_stem=True,
    use_dwc_mlp=True,
    use_lpu=True,
    drop_path_rate=0.0)
widths = [32, 64, 128, 256]  # of the feature maps at strides 4, 8, 16, 32
