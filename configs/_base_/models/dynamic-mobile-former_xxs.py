# Dynamic Mobile-Former XXS for detection. No weights are published: train
# the classifier, image-classifier_dynamic-mobile-former-xxs_..., and put its checkpoint
# there. From scratch: --cfg-options model.backbone.init_cfg=None model.backbone.frozen_stages=-1
dynamic_mobile_former = dict(
    type='DynamicMobileFormer',
    arch='xxs',
    drop_path_rate=0.1,
    norm_cfg=dict(type='SyncBN'),
    frozen_stages=2,  # blocks 0 to 3; the stem learns, as in the published runs
    init_cfg=dict(
        type='Pretrained', checkpoint='checkpoints/dynamic-mobile-former-xxs_in1k.pth'))
widths = [20, 36, 88, 120]  # of the feature maps at strides 4, 8, 16, 32
