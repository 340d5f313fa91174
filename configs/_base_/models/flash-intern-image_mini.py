# FlashInternImage with the blocks of the published sizes, small enough for CPU cores and images of
# a few hundred pixels.
flash_intern_image = dict(
    type='FlashInternImage',
    channels=32,
    depths=(2, 2, 4, 2),
    groups=(2, 4, 8, 16),  # 16 channels per group
    drop_path_rate=0.0)
