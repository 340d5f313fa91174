# InternImage-S (DCNv3) for dense prediction: layer scale starts at 1, or at what the weights hold.
intern_image = dict(
    type='InternImage',
    arch='s',
    layer_scale=1.0,
    # ImageNet-1K weights from the Hugging Face repository OpenGVLab/InternImage; not downloaded.
    # From scratch: --cfg-options model.backbone.init_cfg=None
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/internimage_s_1k_224.pth'))
widths = [80, 160, 320, 640]  # of the feature maps at strides 4, 8, 16, 32
