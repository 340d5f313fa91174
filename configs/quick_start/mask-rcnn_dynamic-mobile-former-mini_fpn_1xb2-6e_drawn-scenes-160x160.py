# The Mask R-CNN of the quick start with a small Dynamic Mobile-Former as its backbone.
_base_ = ['./mask-rcnn_flash-intern-image-mini_fpn_1xb2-6e_drawn-scenes-160x160.py',
          '../_base_/models/dynamic-mobile-former_mini.py']

model = dict(
    backbone=dict(
        _delete_=True,  # FlashInternImage
        **_base_.dynamic_mobile_former),
    neck=dict(in_channels=_base_.widths))

# A last batch of one image would have nothing to normalise in the kernel attention.
train_dataloader = dict(drop_last=True)
