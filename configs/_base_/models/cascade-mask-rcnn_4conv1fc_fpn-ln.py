# The same with a layer norm behind every convolution of the neck.
_base_ = './cascade-mask-rcnn_4conv1fc_fpn.py'

model = dict(neck=dict(norm_cfg=dict(type='ChannelLN')))
