# DCNv4 in the place of the 3x3 convolutions of the last three stages of a ResNet-50.
_base_ = ['mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', '../_base_/plugin.py']

model = dict(
    backbone=dict(
        dcn=dict(type='DCNv4', fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True)))

default_hooks = dict(checkpoint=dict(max_keep_ckpts=2, save_best='auto'))  # mmdet: keeps all
