# A baseline of Table 7 of the DCNv4 paper, from the BEVFormer v2 paper.
_base_ = './bevformer-v2_intern-image-b_offline_16xb1-24e_nus.py'

model = dict(
    img_backbone=dict(
        arch='xl',
        drop_path_rate=0.4,  # a guess: the paper names none
        init_cfg=dict(
            checkpoint='checkpoints/cascade_internimage_xl_fpn_3x_coco.pth')),
    img_neck=dict(in_channels=[384, 768, 1536]))

# 32 GPUs x 1 sample
optim_wrapper = dict(optimizer=dict(lr=5e-4), paramwise_cfg=dict(layer_decay_rate=0.94))
auto_scale_lr = dict(base_batch_size=32)
