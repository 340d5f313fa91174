# Drawn shapes with masks. python tools/dataset_converters/drawn_scenes.py data/drawn_scenes
data_root = 'data/drawn_scenes/coco/'
scenes = dict(
    type='CocoDataset',
    data_root=data_root,
    metainfo=dict(
        classes=('disk', 'ring', 'square', 'triangle', 'star'),
        palette=[(230, 70, 60), (70, 130, 240), (60, 180, 90), (240, 180, 40), (170, 90, 220)]))
load_image = dict(type='LoadImageFromFile')
load_annotations = dict(type='LoadAnnotations', with_bbox=True, with_mask=True)
resize = dict(type='Resize', scale=(160, 160), keep_ratio=True)
# Small batches: a short training gains from many steps. Read in the main process, in 2 ms, which is
# less than it takes to receive a batch from a worker.
train_dataloader = dict(
    batch_size=2,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(
        **scenes,
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='images/train/'),
        filter_cfg=dict(filter_empty_gt=True),
        pipeline=[
            load_image,
            load_annotations,
            resize,
            dict(type='RandomFlip', prob=[0.25, 0.25, 0.25],
                 direction=['horizontal', 'vertical', 'diagonal']),
            dict(type='PackDetInputs'),
        ]))
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        **scenes,
        ann_file='annotations/instances_val.json',
        data_prefix=dict(img='images/val/'),
        test_mode=True,
        pipeline=[
            load_image,
            resize,
            load_annotations,  # stay as they are: predictions are brought to the original size
            dict(type='PackDetInputs',
                 meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
        ]))
test_dataloader = val_dataloader
val_evaluator = dict(type='CocoMetric', ann_file=data_root + 'annotations/instances_val.json',
                     metric=['bbox', 'segm'])
test_evaluator = val_evaluator
