_base_ = '../_base_/methods/image-classifier_20e_in1k-384x384.py'

# The ImageNet-22K classifier with the rows of its head that ImageNet-1K has, from
# tools/model_converters/convert_checkpoint.py classifier-22kto1k; see README.md.
# From scratch: --cfg-options load_from=None
load_from = 'checkpoints/intern-image-xl_22kto1k-rows.pth'
model = dict(
    backbone=dict(type='InternImage', arch='xl', drop_path_rate=0.2),
    neck=dict(in_channels=1536, out_channels=2304),
    head=dict(in_channels=2304))

# No layer decay, and so no factor for names with `offset`: the published program has it only there.
optim_wrapper = dict(paramwise_cfg=dict(layer_decay_rate=1.0, custom_keys=None))
