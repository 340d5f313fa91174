# InternImage-L (DCNv3) for dense prediction: layer scale starts at 1, or at what the weights hold.
intern_image = dict(
    type='InternImage',
    arch='l',
    layer_scale=1.0,
    # ImageNet-22K weights from the Hugging Face repository OpenGVLab/InternImage; not downloaded.
    # From scratch: --cfg-options model.backbone.init_cfg=None
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/internimage_l_22k_192to384.pth'))
widths = [160, 320, 640, 1280]  # of the feature maps at strides 4, 8, 16, 32
