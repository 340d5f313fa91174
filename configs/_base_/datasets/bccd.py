# BCCD: 364 microscope images of blood with boxes of three kinds of cells, 640 x 480, read at half
# that size. https://github.com/Shenggan/BCCD_Dataset, boxes as COCO JSON in data/bccd/annotations.
data_root = 'data/bccd/'
cells = dict(
    type='CocoDataset',
    data_root=data_root,
    data_prefix=dict(img='images/'),
    metainfo=dict(
        classes=('RBC', 'WBC', 'Platelets'),
        palette=[(230, 70, 60), (70, 130, 240), (60, 180, 90)]))
resize = dict(type='Resize', scale=(320, 240), keep_ratio=True)
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        **cells,
        ann_file='annotations/train.json',
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            resize,
            dict(type='RandomFlip', prob=[0.25, 0.25, 0.25],
                 direction=['horizontal', 'vertical', 'diagonal']),
            dict(type='PhotoMetricDistortion'),
            dict(type='PackDetInputs'),
        ]))
val_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **cells,
        ann_file='annotations/val.json',
        test_mode=True,
        pipeline=[
            dict(type='LoadImageFromFile'),
            resize,
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='PackDetInputs',
                 meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
        ]))
test_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(val_dataloader['dataset'], ann_file='annotations/test.json'))
val_evaluator = dict(type='CocoMetric', ann_file=data_root + 'annotations/val.json',
                     metric='bbox')
test_evaluator = dict(val_evaluator, ann_file=data_root + 'annotations/test.json')
