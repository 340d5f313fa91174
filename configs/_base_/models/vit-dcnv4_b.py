# ViT-B with DCNv4 for dense prediction; all its maps have stride 16 and 768 channels.
vit = dict(
    type='ViTDCNv4',
    arch='b',
    # From the ImageNet run in configs/vit_dcnv4, or mmpretrain's plain DeiT-B, which lacks the
    # DCNv4 layers. From scratch: --cfg-options model.backbone.init_cfg=None
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/vit-dcnv4-b_in1k.pth'))
