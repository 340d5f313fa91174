# ConvNeXt-T with DCNv4 for dense prediction.
convnext = dict(
    type='ConvNeXtDCNv4',
    arch='t',
    layer_scale_init_value=1.0,  # as in mmdet's ConvNeXt detectors
    # From the ImageNet run in configs/convnext_dcnv4, or mmpretrain's plain ConvNeXt, which lacks
    # the DCNv4 layers. From scratch: --cfg-options model.backbone.init_cfg=None
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/convnext-dcnv4-t_in1k.pth'))
widths = [96, 192, 384, 768]  # of the feature maps at strides 4, 8, 16, 32
