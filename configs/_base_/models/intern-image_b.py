# InternImage-B (DCNv3) for dense prediction: layer scale starts at 1, or at what the weights hold.
intern_image = dict(
    type='InternImage',
    arch='b',
    layer_scale=1.0,
    # ImageNet-1K weights from the Hugging Face repository OpenGVLab/InternImage; not downloaded.
    # From scratch: --cfg-options model.backbone.init_cfg=None
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/internimage_b_1k_224.pth'))
widths = [112, 224, 448, 896]  # of the feature maps at strides 4, 8, 16, 32
