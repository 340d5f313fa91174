# The quick start with everything smaller and nothing random but the weights, for tests.
_base_ = ['../../../configs/quick_start/'
          'mask-rcnn_flash-intern-image-mini_fpn_1xb2-6e_drawn-scenes-160x160.py']

everything = 1_000_000  # more samples than there are candidates: samplers choose all, not at random
model = dict(
    backbone=dict(channels=8, depths=(1, 1, 1, 1), groups=(1, 2, 4, 8)),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(num_convs=1, in_channels=16, conv_out_channels=16)),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=everything)),
        rpn_proposal=dict(nms_pre=20, max_per_img=10),
        rcnn=dict(sampler=dict(num=everything))),
    test_cfg=dict(rpn=dict(nms_pre=20, max_per_img=10), rcnn=dict(max_per_img=5)))

train_dataloader = dict(
    batch_size=2, num_workers=0, persistent_workers=False,
    dataset=dict(pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='LoadAnnotations', with_bbox=True, with_mask=True),
        dict(type='PackDetInputs'),
    ]))
val_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
default_hooks = dict(logger=dict(interval=1))
