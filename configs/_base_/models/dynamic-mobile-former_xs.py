# Dynamic Mobile-Former XS for detection. No weights are published: train
# the classifier, image-classifier_dynamic-mobile-former-xs_..., and put its checkpoint
# there. From scratch: --cfg-options model.backbone.init_cfg=None model.backbone.frozen_stages=-1
dynamic_mobile_former = dict(
    type='DynamicMobileFormer',
    arch='xs',
    drop_path_rate=0.1,
    norm_cfg=dict(type='SyncBN'),
    frozen_stages=2,  # blocks 0 to 3; the stem learns, as in the published runs
    init_cfg=dict(
        type='Pretrained', checkpoint='checkpoints/dynamic-mobile-former-xs_in1k.pth'))
widths = [30, 54, 132, 180]  # of the feature maps at strides 4, 8, 16, 32
