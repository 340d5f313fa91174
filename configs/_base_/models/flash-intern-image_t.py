# FlashInternImage-T for dense prediction: layer scale is present and starts at 1, so that the
# ImageNet-1K weights, which have none, mean the same function.
flash_intern_image = dict(
    type='FlashInternImage',
    arch='t',
    layer_scale=1.0,
    # Published in the Hugging Face repository OpenGVLab/DCNv4; not downloaded automatically.
    # From scratch: --cfg-options model.backbone.init_cfg=None
    init_cfg=dict(
        type='Pretrained', checkpoint='checkpoints/flash_intern_image_t_1k_224.pth'))
widths = [64, 128, 256, 512]  # of the feature maps at strides 4, 8, 16, 32
