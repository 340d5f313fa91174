# The Mask R-CNN of the quick start with a small DAT++ in place of FlashInternImage.
_base_ = ['./mask-rcnn_flash-intern-image-mini_fpn_1xb2-6e_drawn-scenes-160x160.py',
          '../_base_/models/dat-pp_mini.py']

model = dict(
    backbone=dict(
        _delete_=True,  # FlashInternImage
        **_base_.dat,
        img_size=160),  # the tables of position biases need not be stretched
    neck=dict(in_channels=_base_.widths))
