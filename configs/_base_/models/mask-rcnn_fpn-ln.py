# mmdet's Mask R-CNN with a layer norm behind every convolution of the neck. The feature maps of
# the post-norm backbones (S, B, L) are unnormalised.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'

model = dict(neck=dict(norm_cfg=dict(type='ChannelLN')))
