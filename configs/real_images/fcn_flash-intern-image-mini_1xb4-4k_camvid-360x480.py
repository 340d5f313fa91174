# The mini network under a light head: mmsegmentation's FCN on the maps of strides 8, 16 and 32, at
# the first of these sizes.
_base_ = ['./upernet_flash-intern-image-mini_1xb4-4k_camvid-360x480.py']

model = dict(
    decode_head=dict(
        _delete_=True,  # the UperNet
        type='FCNHead',
        input_transform='resize_concat',
        in_index=[1, 2, 3],
        in_channels=[64, 128, 256],
        channels=_base_.width,
        num_convs=2,
        dropout_ratio=0.1,
        norm_cfg=dict(type='BN'),
        num_classes=_base_.num_classes,
        ignore_index=_base_.ignore_index,
        align_corners=False,
        loss_decode=dict(type='WeightedCrossEntropy', class_weight=_base_.class_weight)))
