_base_ = [
    'mmdet::_base_/models/mask-rcnn_r50_fpn.py', 'mmdet::_base_/datasets/coco_instance.py',
    'mmdet::_base_/schedules/schedule_1x.py', 'mmdet::_base_/default_runtime.py',
    '../_base_/plugin.py', '../_base_/models/flash-intern-image_t.py'
]

model = dict(
    backbone=dict(
        _delete_=True,  # the ResNet-50 of the base
        **_base_.flash_intern_image,
        drop_path_rate=0.2,
        with_cp=True),
    # a layer norm behind every convolution of the neck
    neck=dict(in_channels=[64, 128, 256, 512], norm_cfg=dict(type='ChannelLN')))

# The learning rate is for 8 GPUs x 2 images.
train_dataloader = dict(batch_size=2)
auto_scale_lr = dict(base_batch_size=16)

# At a rate of 1.0 the constructor still exempts norms and biases from weight decay.
optim_wrapper = dict(
    _delete_=True,  # SGD of the base
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='CustomLayerDecayOptimizerConstructor',
    paramwise_cfg=dict(num_layers=30, layer_decay_rate=1.0, depths=(4, 4, 18, 4)))

default_hooks = dict(checkpoint=dict(max_keep_ckpts=1, save_best='auto'))
