_base_ = './bevformer-v2_flash-intern-image-s_offline_16xb1-24e_nus-trainval.py'

model = dict(
    img_backbone=dict(
        arch='b',
        init_cfg=dict(
            checkpoint='checkpoints/mask_rcnn_flash_internimage_b_fpn_3x_coco.pth')),
    img_neck=dict(in_channels=[224, 448, 896]))
