# Minutes on two CPU cores. First write the dataset:
#   python tools/dataset_converters/synthetic_rig.py data/synthetic-rig
_base_ = './bevformer-v2_flash-intern-image-s_t8_16xb1-24e_nus.py'

pc_range = [-25.6, -25.6, -5.0, 25.6, 25.6, 3.0]  # metres, LiDAR frame
bev_size = (32, 32)  # cells of 1.6 m
frames = (-1, 0)
norm_cfg = dict(type='BN')
model = dict(
    frames=frames,
    grid_mask=None,
    data_preprocessor=dict(pad_size_divisor=32),  # all images have one size: nothing is padded
    img_backbone=dict(
        arch=None,
        channels=16,
        depths=(1, 1, 2, 1),
        groups=(1, 2, 4, 8),
        drop_path_rate=0.0,
        with_cp=False,
        init_cfg=None),
    img_neck=dict(in_channels=[32, 64, 128], out_channels=64),
    bev_encoder=dict(
        pc_range=pc_range,
        bev_size=bev_size,
        embed_dims=64,
        num_layers=2,
        num_heads=4,
        feedforward_channels=128,
        dropout=0.0),
    temporal_fusion=dict(
        bev_size=bev_size,
        embed_dims=64,
        inter_channels=None,
        num_blocks=1,
        # batch statistics of the one sample of a step would not be those of the next
        norm_cfg=dict(_delete_=True, type='GN', num_groups=8)),
    bev_head=dict(
        pc_range=pc_range,
        bev_size=bev_size,
        embed_dims=64,
        num_layers=2,
        num_queries=60,
        num_groups=2,
        layer_cfg=dict(num_heads=4, feedforward_channels=128, dropout=0.0)),
    perspective_head=dict(in_channels=64, num_convs=2, norm_cfg=norm_cfg))

data_root = 'data/synthetic-rig/'
crop_resize = dict(type='MultiViewCropResize', crop=(0, 40, 320, 160), heights=(96,))
train_pipeline = [
    _base_.load, _base_.load_boxes,
    dict(type='ObjectRangeFilter', point_cloud_range=pc_range),
    dict(type='ObjectNameFilter', classes=_base_.classes), crop_resize,
    dict(type='MonoTargets'), _base_.pack
]
test_pipeline = [_base_.load, crop_resize, dict(type='PackBEVInputs', keys=['img'])]
dataset = dict(
    data_root=data_root,
    ann_file='synthetic_infos.pkl',
    metainfo=dict(version='v1.0-mini'),
    frames=frames)
loader = dict(num_workers=0, persistent_workers=False)
train_dataloader = dict(**loader, dataset=dict(**dataset, pipeline=train_pipeline))
val_dataloader = dict(**loader, dataset=dict(**dataset, pipeline=test_pipeline))
test_dataloader = val_dataloader
# the four training samples
val_evaluator = dict(data_root=data_root, ann_file=data_root + 'synthetic_infos.pkl')
test_evaluator = val_evaluator

optim_wrapper = dict(
    _delete_=True,  # layer decay
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.01),
    clip_grad=dict(max_norm=35, norm_type=2))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=20),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=20, end=400, eta_min=2e-5)
]
train_cfg = dict(max_epochs=100, val_interval=100)
auto_scale_lr = dict(base_batch_size=1)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=50, max_keep_ckpts=2))
