# The usual small backbone, from scratch: all layers train, and so do the norms.
_base_ = '../_base_/methods/retinanet_bccd.py'

model = dict(
    backbone=dict(depth=18, out_indices=(1, 2, 3), frozen_stages=-1, norm_eval=False,
                  init_cfg=None),
    neck=dict(in_channels=[128, 256, 512]))
