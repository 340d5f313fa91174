# DAT tiny, the first version. ImageNet-1K weights are linked by github.com/LeapLabTHU/DAT; download
# them by hand. From scratch: --cfg-options model.backbone.init_cfg=None
dat = dict(
    type='DAT',
    arch='dat_tiny',
    init_cfg=dict(type='Pretrained', checkpoint='checkpoints/dat_tiny_in1k_224.pth'))
widths = [96, 192, 384, 768]  # of the feature maps at strides 4, 8, 16, 32
