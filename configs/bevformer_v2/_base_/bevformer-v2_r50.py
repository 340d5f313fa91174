# BEVFormer v2 with ResNet-50: one frame, one group of queries.
pc_range = [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0]  # metres, LiDAR frame
bev_size = (200, 200)  # cells of 0.512 m
norm_cfg = dict(type='SyncBN', requires_grad=True)

model = dict(
    type='BEVFormerV2',
    frames=(0,),
    grid_mask=dict(prob=0.7, ratio=0.5),
    mono_loss_weight=1.0,
    data_preprocessor=dict(
        type='Det3DDataPreprocessor',
        mean=[103.53, 116.28, 123.675],
        std=[1.0, 1.0, 1.0],
        # the stride of the coarsest map of the BEV encoder: its cells are 64 pixels wide, whatever
        # the size of the image and of its neighbours in the batch
        pad_size_divisor=64),
    img_backbone=dict(
        type='mmdet.ResNet',
        depth=50,
        out_indices=(1, 2, 3),
        frozen_stages=-1,
        norm_cfg=norm_cfg,
        norm_eval=False,
        style='caffe',
        # the backbone of a detector trained on COCO, as published; ImageNet weights are worse
        init_cfg=dict(
            type='Pretrained',
            prefix='backbone.',
            checkpoint='https://download.openmmlab.com/mmdetection/v2.0/fcos/'
            'fcos_r50_caffe_fpn_gn-head_1x_coco/'
            'fcos_r50_caffe_fpn_gn-head_1x_coco-821213aa.pth')),
    img_neck=dict(
        type='mmdet.FPN',
        in_channels=[512, 1024, 2048],
        out_channels=256,
        start_level=0,
        add_extra_convs='on_output',
        num_outs=5,
        relu_before_extra_convs=True),
    bev_encoder=dict(type='BEVFormerV2Encoder', pc_range=pc_range, bev_size=bev_size),
    bev_head=dict(
        type='BEVFormerV2Head', num_classes=10, pc_range=pc_range, bev_size=bev_size),
    perspective_head=dict(type='PerspectiveHead', num_classes=10, norm_cfg=norm_cfg))
