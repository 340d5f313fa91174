_base_ = '../_base_/methods/image-classifier_20e_in1k-384x384.py'

# The ImageNet-22K classifier with the rows of its head that ImageNet-1K has, from
# tools/model_converters/convert_checkpoint.py classifier-22kto1k; see README.md.
# From scratch: --cfg-options load_from=None
load_from = 'checkpoints/intern-image-l_22kto1k-rows.pth'
model = dict(
    backbone=dict(type='InternImage', arch='l', drop_path_rate=0.1),
    neck=dict(in_channels=1280, out_channels=1920),
    head=dict(in_channels=1920))
