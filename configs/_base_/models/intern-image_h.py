# InternImage-H (DCNv3), 1.07 billion parameters, without layer scale.
intern_image = dict(
    type='InternImage',
    arch='h',
    # Weights of a joint data set of 427 million images, then ImageNet-22K, from the Hugging Face
    # repository OpenGVLab/InternImage; not downloaded.
    # From scratch: --cfg-options model.backbone.init_cfg=None
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/internimage_h_jointto22k_384.pth'))
widths = [320, 640, 1280, 2560]  # of the feature maps at strides 4, 8, 16, 32
