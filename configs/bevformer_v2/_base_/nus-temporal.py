# nuScenes, six cameras; the temporal configs set `frames` in model and datasets.
data_root = 'data/nuscenes/'
# by alphabet, as model.perspective_head.classes; another order here must be set there too
classes = [
    'barrier', 'bicycle', 'bus', 'car', 'construction_vehicle', 'motorcycle', 'pedestrian',
    'traffic_cone', 'trailer', 'truck'
]
point_cloud_range = [-51.2, -51.2, -5.0, 51.2, 51.2, 3.0]  # metres, LiDAR frame
crop = (0, 260, 1600, 900)  # x1, y1, x2, y2 of the 1600 x 900 image: the sky goes
cameras = ('CAM_FRONT', 'CAM_FRONT_RIGHT', 'CAM_FRONT_LEFT', 'CAM_BACK', 'CAM_BACK_LEFT',
           'CAM_BACK_RIGHT')
modality = dict(
    use_camera=True, use_lidar=False, use_radar=False, use_map=False, use_external=False)

photometric = dict(
    type='MultiViewWrapper',
    transforms=[dict(type='PhotoMetricDistortion3D')],
    override_aug_config=False,  # every image by itself
    process_fields=['img'],
    collected_keys=[])
load = dict(type='LoadTemporalMultiViewImages', cameras=cameras)
load_boxes = dict(type='LoadAnnotations3D', with_bbox_3d=True, with_label_3d=True)
filter_boxes = [
    dict(type='ObjectRangeFilter', point_cloud_range=point_cloud_range),
    dict(type='ObjectNameFilter', classes=classes)
]
pack = dict(type='PackBEVInputs')
train_pipeline = [
    load, load_boxes, *filter_boxes,
    dict(type='MultiViewCropResize', crop=crop, heights=(640,)), photometric,
    dict(type='ClipToUint8'),
    dict(type='MonoTargets'), pack
]
test_pipeline = [
    load,
    dict(type='MultiViewCropResize', crop=crop, heights=(640,)),
    dict(type='ClipToUint8'),
    dict(type='PackBEVInputs', keys=['img'])
]
dataset = dict(
    type='NuScenesTemporalDataset',
    data_root=data_root,
    data_prefix={'pts': '', **{camera: f'samples/{camera}' for camera in cameras}},
    metainfo=dict(classes=classes),
    modality=modality,
    use_valid_flag=True,  # objects with a LiDAR or radar point
    frames=(0,))

# 16 GPUs x 1 sample
train_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        **dataset, ann_file='nuscenes_infos_train.pkl', pipeline=train_pipeline,
        test_mode=False))
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    drop_last=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **dataset, ann_file='nuscenes_infos_val.pkl', pipeline=test_pipeline, test_mode=True))
test_dataloader = val_dataloader
val_evaluator = dict(
    type='NuScenesSplitMetric',
    data_root=data_root,
    ann_file=data_root + 'nuscenes_infos_val.pkl',
    metric='bbox',
    modality=modality)
test_evaluator = val_evaluator
