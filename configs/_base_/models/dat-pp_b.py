# DAT++ base. ImageNet-1K weights are linked by github.com/LeapLabTHU/DAT; download them by hand.
# From scratch: --cfg-options model.backbone.init_cfg=None
dat = dict(
    type='DAT',
    arch='dat_pp_base',
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/dat_pp_base_in1k_224.pth'))
widths = [128, 256, 512, 1024]  # of the feature maps at strides 4, 8, 16, 32
