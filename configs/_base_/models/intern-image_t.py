# InternImage-T (DCNv3) for dense prediction, as FlashInternImage-T: layer scale starts at 1.
intern_image = dict(
    type='InternImage',
    arch='t',
    layer_scale=1.0,
    # ImageNet-1K weights from the Hugging Face repository OpenGVLab/InternImage; not downloaded.
    # From scratch: --cfg-options model.backbone.init_cfg=None
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/internimage_t_1k_224.pth'))
widths = [64, 128, 256, 512]  # of the feature maps at strides 4, 8, 16, 32
