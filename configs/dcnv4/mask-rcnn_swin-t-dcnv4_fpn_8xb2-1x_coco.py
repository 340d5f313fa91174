# DCNv4 in place of the window attention of mmdet's Swin-T; the weights of Swin keep the rest.
_base_ = ['mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', '../_base_/plugin.py']

model = dict(
    backbone=dict(
        _delete_=True,  # the plain Swin Transformer, which is inside now
        type='with_dcnv4',
        module=_base_.model.backbone,
        replace=dict(match='*.attn', targets=('attention', ), cfg=dict(group_channels=32))))
