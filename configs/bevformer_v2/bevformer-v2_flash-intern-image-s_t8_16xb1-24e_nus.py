_base_ = './bevformer-v2_r50_t8_16xb1-24e_nus.py'

model = dict(
    data_preprocessor=dict(
        mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    img_backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        type='FlashInternImage',
        arch='s',
        layer_scale=1.0,
        drop_path_rate=0.3,  # a guess: the paper names none
        with_cp=True,
        out_indices=(1, 2, 3),
        # A guess: the DCNv4 paper starts from ImageNet, the BEVFormer v2 paper from COCO. This is
        # the backbone of a COCO detector (Mask R-CNN, 3x), from the Hugging Face repository
        # OpenGVLab/DCNv4; not downloaded. For ImageNet: flash_intern_image_s_1k_224.pth.
        init_cfg=dict(
            type='Pretrained',
            checkpoint='checkpoints/mask_rcnn_flash_internimage_s_fpn_3x_coco.pth')),
    img_neck=dict(in_channels=[160, 320, 640]))

# The schedule is that of InternImage-B in the BEVFormer v2 paper; for S a guess.
optim_wrapper = dict(
    constructor='CustomLayerDecayOptimizerConstructor',
    paramwise_cfg=dict(
        _delete_=True,  # the lower rate of the ResNet
        layer_decay_rate=0.96,
        head_embed_decay=False))  # the level embedding of the BEV encoder learns at the full rate
