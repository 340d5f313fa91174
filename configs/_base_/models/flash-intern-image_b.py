# FlashInternImage-B for dense prediction: layer scale starts at 1, or at what the weights hold.
flash_intern_image = dict(
    type='FlashInternImage',
    arch='b',
    layer_scale=1.0,
    # ImageNet-1K weights from the Hugging Face repository OpenGVLab/DCNv4; not downloaded.
    # From scratch: --cfg-options model.backbone.init_cfg=None
    init_cfg=dict(
        type='Pretrained', checkpoint='checkpoints/flash_intern_image_b_1k_224.pth'))
widths = [112, 224, 448, 896]  # of the feature maps at strides 4, 8, 16, 32
